"""Images: names mapped to environments on this machine. Nothing is pulled.

An environment is a folder with a Python virtual environment made from the project's wheel. A container sees it at its
own path, with the interpreter it was made from and the host's /usr, all read-only, and nothing else of this machine.
The built-in image `devcluster/tools:dev` is the host's /usr alone. The table is images.yaml in the state folder; it is
read anew at each look-up, so a name may be added while the cluster runs.
"""

import hashlib
import os
import subprocess
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from devcluster import binaries, dockerfile
from devcluster.errors import DevclusterError

REPOSITORY = Path(__file__).parent.parent
# The project's own images: their Dockerfiles say how they run. The prefix is where those install the environment.
DOCKERFILES = {
    "posttrain-operator": REPOSITORY / "operator" / "Dockerfile",
    "posttrain-trainer": REPOSITORY / "trainer_image" / "Dockerfile",
}
IMAGE_PREFIX = "/opt/posttrain"
TOOLS = "devcluster/tools:dev"
DEFAULT_UID = 1000
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Image:
    """What a name stands for. `binds` are read-only folders that appear at their own paths."""

    name: str
    uid: int = DEFAULT_UID
    entrypoint: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    binds: tuple[str, ...] = ()
    workdir: str = "/"


def parse_option(text: str) -> tuple[str, dict[str, object]]:
    """`NAME=ENVDIR[:uid]` as a table entry; raises DevclusterError for another form."""
    name, equals, rest = text.partition("=")
    folder, colon, uid = rest.rpartition(":")
    if not colon or not uid.isdigit():
        folder, uid = rest, ""
    if not equals or not name or not folder:
        raise DevclusterError(f"--image {text!r}: expected NAME=ENVDIR or NAME=ENVDIR:UID")
    path = Path(folder).absolute()
    if not (path / "bin" / "python").exists():
        raise DevclusterError(f"--image {name}: {path}/bin/python does not exist; next: make the environment first")
    return name, {"env": str(path), **({"uid": int(uid)} if uid else {})}


def _ask_python(python: Path, code: str) -> str:
    done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DevclusterError(f"{python} does not run: {done.stderr.strip()}")
    return done.stdout.strip()


def _has_bytecode(site: Path) -> bool:
    sources = list(site.glob("*/__init__.py"))[:40]
    compiled = [path for path in sources if any((path.parent / "__pycache__").glob("__init__.*.pyc"))]
    return len(compiled) * 2 >= len(sources)


def _bytecode_prefix(python: Path, site: Path) -> str:
    """A filled PYTHONPYCACHEPREFIX for an environment without bytecode, or ''.

    A read-only environment without bytecode compiles every module anew in every process: importing torchrun took
    5.2 s instead of 2.7 s.
    """
    if _has_bytecode(site):
        return ""
    stamp = f"{site}:{site.stat().st_mtime_ns}"
    folder = binaries.cache_root() / "bytecode" / hashlib.sha256(stamp.encode()).hexdigest()[:16]
    if not (folder / ".done").exists():
        base = _ask_python(python, "import sysconfig; print(sysconfig.get_path('stdlib'))")
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder)}
        command = [str(python), "-I", "-m", "compileall", "-q", "-j2", str(site), base]
        # -I ignores the variable, hence -X; files that do not compile (templates, Python 2) are no reason to stop.
        command[2:2] = ["-X", f"pycache_prefix={folder}"]
        subprocess.run(command, env=environment, capture_output=True, check=False)
        (folder / ".done").touch()
    return str(folder)


def _declared(name: str, env: Path) -> dockerfile.Settings:
    """What the image's Dockerfile says, for the project's own images."""
    path = DOCKERFILES.get(name.rpartition("/")[2].partition(":")[0])
    if path is None or not path.exists():
        return dockerfile.Settings(uid=DEFAULT_UID)
    return dockerfile.parse(path.read_text(), IMAGE_PREFIX, str(env))


def _python_image(name: str, entry: dict[str, Any]) -> Image:
    env = Path(str(entry["env"])).absolute()
    python = env / "bin" / "python"
    lines = "import sys, sysconfig; print(sys.base_prefix); print(sysconfig.get_path('purelib'))"
    base, site = _ask_python(python, lines).splitlines()
    declared = _declared(name, env)
    environment = {"PYTHONUNBUFFERED": "1", **declared.environment, "PATH": f"{env}/bin:{SYSTEM_PATH}"}
    binds = [str(env)] + ([] if base.startswith("/usr") and not base.startswith("/usr/local") else [base])
    prefix = _bytecode_prefix(python, Path(site))
    if prefix:
        environment["PYTHONPYCACHEPREFIX"] = prefix
        binds.append(prefix)
    uid = entry.get("uid", DEFAULT_UID if declared.uid is None else declared.uid)
    return Image(
        name,
        int(uid),
        tuple(entry.get("entrypoint") or declared.entrypoint),
        {**environment, **(entry.get("environment") or {})},
        tuple(binds),
        str(entry.get("workdir", declared.workdir)),
    )


def present() -> dict[str, dict[str, object]]:
    """Table entries of the project's own environments that exist (`make images-local`): tags `dev` and the version."""
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    found: dict[str, dict[str, object]] = {}
    for image, path in DOCKERFILES.items():
        env = REPOSITORY / ".build" / "envs" / image.removeprefix("posttrain-")
        if path.exists() and (env / "bin" / "python").exists():
            found |= {f"{image}:{tag}": {"env": str(env)} for tag in ("dev", version)}
    return found


class Images:
    """The table of one cluster. `refused` are names that a fault has taken away."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.refused: set[str] = set()
        self._resolved: dict[str, tuple[str, Image]] = {}

    def table(self) -> dict[str, dict[str, Any]]:
        """Name -> entry, as written in images.yaml."""
        if not self.path.exists():
            return {}
        return dict(yaml.safe_load(self.path.read_text()) or {})

    def add(self, entries: dict[str, dict[str, Any]]) -> None:
        """Add or replace names."""
        self.path.write_text(yaml.safe_dump(self.table() | entries))

    def find(self, name: str) -> Image | None:
        """The image of this name, or None: unknown, refused, or its environment is gone. May take a while once."""
        short = name.removeprefix("docker.io/").removeprefix("library/")
        if name in self.refused or short in self.refused:
            return None
        if short == TOOLS:
            return Image(TOOLS, environment={"PATH": SYSTEM_PATH})
        entry = self.table().get(name) or self.table().get(short)
        if entry is None:
            return None
        key = repr(sorted(entry.items()))
        if name not in self._resolved or self._resolved[name][0] != key:
            self._resolved[name] = (key, _python_image(short, entry))
        return self._resolved[name][1]
