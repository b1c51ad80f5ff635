"""The locks: complete, consistent, portable, in step with pyproject.toml, and good for an empty environment.

Nothing is resolved here. What the development environment has installed is read by its own metadata, so a lock that is
stale or not closed shows without asking any index.
"""

import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
NAMES = ("operator", "trainer", "dev", "build", "uv", "stores", "plot", "go")
LOCKS = {name: ROOT / "locks" / f"{name}.txt" for name in NAMES}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UV = ROOT / ".venv" / "bin" / "uv"
EXTRAS = ("operator", "trainer", "dev")
ENTRY = re.compile(
    r"^([A-Za-z0-9._-]+)==(\S+)(?: ; (.+?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)


def pins(name: str) -> dict[str, str]:
    """Name -> version of a lock, for the system and Python that run this test."""
    return {
        canonicalize_name(package): version
        for package, version, marker, _ in ENTRY.findall(LOCKS[name].read_text())
        if not marker or Marker(marker).evaluate()
    }


def declared(extra: str) -> list[Requirement]:
    """Requirements of an extra and of the base, our own extras unfolded."""
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]
    found: list[Requirement] = []
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            found += [inner for name in sorted(requirement.extras) for inner in declared(name)]
        else:
            found.append(requirement)
    return found


def closure(requirements: list[Requirement]) -> set[str]:
    """Names of everything that these requirements bring, by the metadata of the installed distributions."""
    seen: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(r.name), extra) for r in requirements for extra in ("", *r.extras)]
    while todo:
        key = todo.pop()
        if key in seen:
            continue
        seen.add(key)
        for line in distribution(key[0]).requires or ():
            inner = Requirement(line)
            if not inner.marker or inner.marker.evaluate({"extra": key[1]}):
                todo += [(canonicalize_name(inner.name), extra) for extra in ("", *inner.extras)]
    return {name for name, _ in seen}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_pinned_and_hashed_entries_only(name: str) -> None:
    """Nothing but entries: no host, no path, no comment that would differ between machines."""
    text = LOCKS[name].read_text()
    assert text == "".join(match.group(0) for match in ENTRY.finditer(text))
    assert text


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_lock_meets_pyproject(extra: str) -> None:
    locked = pins(extra)
    unmet = [str(r) for r in declared(extra) if Version(locked[canonicalize_name(r.name)]) not in r.specifier]
    assert unmet == []


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_lock_is_exactly_the_closure_of_its_extra(extra: str) -> None:
    assert set(pins(extra)) == closure(declared(extra))


@pytest.mark.parametrize("name", ["operator", "trainer", "uv"])
def test_locks_agree_with_the_development_lock(name: str) -> None:
    dev = pins("dev")
    assert {package: version for package, version in pins(name).items() if dev.get(package) != version} == {}


def test_the_operator_brings_no_torch_and_the_trainer_no_kubernetes() -> None:
    assert not {"torch", "transformers", "deepspeed", "numpy"} & set(pins("operator"))
    assert not {"kopf", "kubernetes"} & set(pins("trainer"))


def test_the_makefile_makes_what_is_committed() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert f"'uv=={pins('uv')['uv']}'" in makefile
    assert {"hatchling", "setuptools", "wheel"} <= set(pins("build"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(
        "build",
        "-q",
        "--wheel",
        "--require-hashes",
        "--build-constraints",
        str(LOCKS["build"]),
        "--out-dir",
        str(folder),
        ".",
    )
    (built,) = folder.glob("*.whl")
    return built


def run(*arguments: str) -> None:
    done = subprocess.run([str(UV), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Environment:
    """An environment of one lock and the wheel, and no way to see the repository."""

    folder: Path

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = str(self.folder / "bin" / "python")
        clean = {"PATH": "/usr/bin:/bin", "HOME": str(self.folder)}
        return subprocess.run([program, *arguments], cwd=self.folder, capture_output=True, text=True, env=clean)


def build(folder: Path, lock: Path, wheel: Path) -> Environment:
    """As in the images: hashes required, the wheel without its dependencies, and nothing missing after it."""
    python = ("--python", str(folder / "bin" / "python"))
    run("venv", "-q", "--python", sys.executable, str(folder))
    run("pip", "sync", "-q", *python, "--require-hashes", "--build-constraints", str(LOCKS["build"]), str(lock))
    run("pip", "install", "-q", *python, "--no-deps", "--no-index", str(wheel))
    return Environment(folder)


IMPORT_ALL = """
import importlib, pkgutil, sys
for root in sys.argv[1:]:
    for found in pkgutil.walk_packages([importlib.import_module(root).__path__[0]], root + "."):
        importlib.import_module(found.name)
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "packages", "start", "code", "said"),
    [
        (
            "operator",
            ("posttrain_api", "posttrain_operator"),
            "posttrain_operator",
            2,
            "POSTTRAIN_OPERATOR_TRAINER_IMAGE is required",
        ),
        ("trainer", ("posttrain_api", "posttrain_trainer"), "posttrain_trainer", 10, "set POSTTRAIN_CONFIG"),
    ],
    ids=["operator", "trainer"],
)
def test_an_empty_environment_runs_from_lock_and_wheel(
    name: str, packages: tuple[str, ...], start: str, code: int, said: str, wheel: Path, tmp_path: Path
) -> None:
    """Every module can be imported, and the program gets as far as asking for its configuration."""
    environment = build(tmp_path / "env", LOCKS[name], wheel)
    run("pip", "check", "-q", "--python", str(tmp_path / "env" / "bin" / "python"))
    imported = environment.python("-c", IMPORT_ALL, *packages)
    assert imported.returncode == 0, imported.stderr
    started = environment.python("-m", start)
    assert started.returncode == code, started.stderr
    assert said in started.stdout + started.stderr


def test_the_command_line_needs_the_base_only(wheel: Path, tmp_path: Path) -> None:
    wanted = closure([Requirement(line) for line in PROJECT["dependencies"]])
    entries = [m.group(0) for m in ENTRY.finditer(LOCKS["operator"].read_text()) if canonicalize_name(m[1]) in wanted]
    lock = tmp_path / "base.txt"
    lock.write_text("".join(entries))
    environment = build(tmp_path / "env", lock, wheel)
    job = ROOT / "examples" / "quickstart" / "01-pretrain.yaml"
    done = environment.python("-m", "posttrain_cli", "validate", str(job))
    assert done.returncode == 0, done.stdout + done.stderr
