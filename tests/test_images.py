"""The Dockerfiles without Docker: one locked install each, nothing else from outside, a user that is not root."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {"operator": ROOT / "operator" / "Dockerfile", "trainer": ROOT / "trainer_image" / "Dockerfile"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

Instruction = tuple[str, str]


def instructions(name: str) -> list[Instruction]:
    """(keyword, rest) of each instruction, comments dropped and continued lines joined."""
    text = "\n".join(line for line in FILES[name].read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def last_stage(name: str) -> list[Instruction]:
    every = instructions(name)
    start = max(i for i, (word, _) in enumerate(every) if word == "FROM")
    return every[start:]


def commands(name: str) -> list[list[str]]:
    """Every shell command of every RUN, split into words."""
    runs = [rest for word, rest in instructions(name) if word == "RUN"]
    return [shlex.split(part) for rest in runs for part in rest.split("&&")]


def environment(stage: list[Instruction]) -> dict[str, str]:
    return dict(word.split("=", 1) for key, rest in stage if key == "ENV" for word in shlex.split(rest))


@pytest.mark.parametrize("name", FILES)
def test_packages_come_from_locks_with_hashes_or_from_the_projects_wheel(name: str) -> None:
    installs = [c for c in commands(name) if {"pip", "/opt/uv/bin/pip"} & set(c) and {"install", "sync"} & set(c)]
    for words in installs:
        if "--no-index" in words:
            assert "--no-deps" in words
            assert words[-1] == "/dist/*.whl"
        else:
            assert "--require-hashes" in words, words
            assert words[-1] in (f"locks/{name}.txt", "locks/uv.txt", "/tmp/deepspeed.txt"), words
    assert sum(words[-1] == f"locks/{name}.txt" for words in installs) == 1
    assert sum("--no-index" in words for words in installs) == 1


@pytest.mark.parametrize("name", FILES)
def test_building_the_wheel_is_locked_too(name: str) -> None:
    (build,) = [c for c in commands(name) if "build" in c]
    assert {"--require-hashes", "--build-constraints", "locks/build.txt"} <= set(build)


@pytest.mark.parametrize("name", FILES)
def test_nothing_else_reaches_outside(name: str) -> None:
    tools = {words[next(i for i, w in enumerate(words) if "=" not in w)] for words in commands(name)}
    assert tools <= {"apt-get", "rm", "install", "sed", "python", "python3", "/opt/uv/bin/pip", "/opt/uv/bin/uv"}
    assert not [rest for word, rest in instructions(name) if word == "ADD"]


@pytest.mark.parametrize("name", FILES)
def test_base_images_have_a_version_and_no_host(name: str) -> None:
    every = instructions(name)
    arguments = dict(rest.split("=", 1) for word, rest in every if word == "ARG")
    bases = [rest.split()[0] for word, rest in every if word == "FROM"]
    assert len(bases) == 2
    for base in bases:
        image = re.sub(r"\$\{(\w+)\}", lambda m: arguments[m.group(1)], base)
        repository, tag = image.split(":")
        assert "." not in repository.split("/")[0], image
        assert tag not in ("", "latest"), image


@pytest.mark.parametrize("name", FILES)
def test_the_image_runs_as_a_user_on_a_read_only_root(name: str) -> None:
    stage = last_stage(name)
    assert [rest for word, rest in stage if word == "USER"] == ["1000:1000"]
    written = {k: v for k, v in environment(stage).items() if k.endswith(("_DIR", "_HOME")) or k == "HOME"}
    assert written
    assert all(path.startswith(("/work", "/tmp")) for path in written.values()), written
    assert environment(stage)["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_exists_and_is_in_the_context(name: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().split()
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = [
        source.rstrip("/")
        for word, rest in instructions(name)
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]
    assert set(copied) <= allowed
    assert [path for path in copied if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(("name", "module"), [("operator", "posttrain_operator"), ("trainer", "posttrain_trainer")])
def test_it_starts_a_module_that_the_wheel_holds(name: str, module: str) -> None:
    (entry,) = [rest for word, rest in last_stage(name) if word == "ENTRYPOINT"]
    assert entry == f'["python", "-m", "{module}"]'
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    (package,) = [path for path in packages if path.endswith(module)]
    assert (ROOT / package / "__main__.py").exists()


def test_the_cuda_toolkit_is_the_one_of_the_locked_torch() -> None:
    """DeepSpeed refuses to build its kernels where the compiler's minor version is not torch's."""
    (image,) = [rest.split("=")[1] for word, rest in instructions("trainer") if rest.startswith("CUDA=")]
    lock = (ROOT / "locks" / "trainer.txt").read_text()
    (toolkit,) = re.findall(r"^cuda-toolkit==([0-9.]+)", lock, re.MULTILINE)
    assert image.split(".")[:2] == toolkit.split(".")[:2]


def test_kernels_are_built_for_cuda_and_never_for_one_cpu() -> None:
    text = FILES["trainer"].read_text()
    assert "DS_ACCELERATOR=cuda DS_BUILD_FUSED_ADAM=1" in text
    assert "DS_BUILD_CPU_ADAM" not in text
    assert "DS_BUILD_OPS" not in text
