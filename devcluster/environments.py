"""Environments for images, made from the project's wheel as the Dockerfiles do: lock with hashes, then the wheel.

`make("operator", print)` fills `.build/envs/operator`. Nothing is editable: a container sees exactly what an image would hold.
Bytecode is compiled at once, since a container's environment is read-only.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from devcluster.errors import DevclusterError

REPOSITORY = Path(__file__).parent.parent
ENVS = REPOSITORY / ".build" / "envs"
# Environment -> image name.
IMAGES = {"operator": "posttrain-operator:dev", "trainer": "posttrain-trainer:dev"}


def present() -> dict[str, dict[str, object]]:
    """Image table entries of the environments that exist."""
    found = {image: ENVS / name for name, image in IMAGES.items()}
    return {image: {"env": str(path)} for image, path in found.items() if (path / "bin" / "python").exists()}


def _uv() -> str:
    for candidate in (Path(sys.executable).parent / "uv", REPOSITORY / ".build" / "uv" / "bin" / "uv"):
        if candidate.exists():
            return str(candidate)
    found = shutil.which("uv")
    if found:
        return found
    raise DevclusterError("no `uv` to make environments with; next: `make env`, or `pip install uv`")


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DevclusterError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def _wheel(uv: str) -> Path:
    out = REPOSITORY / ".build" / "wheel"
    shutil.rmtree(out, ignore_errors=True)
    _run(uv, "build", "-q", "--wheel", "--out-dir", str(out))
    return next(out.glob("posttrain-*.whl"))


def _stamp(lock: Path) -> str:
    return hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()


def make(name: str, say: Callable[[str], None]) -> Path:
    """Make or bring up to date one environment and return its folder; dependencies only when their lock changed."""
    if name not in IMAGES:
        raise DevclusterError(f"environment {name!r}: expected one of {', '.join(IMAGES)}")
    uv, folder, lock = _uv(), ENVS / name, REPOSITORY / "locks" / f"{name}.txt"
    python, stamp = str(folder / "bin" / "python"), folder / ".lock-stamp"
    if not stamp.exists() or stamp.read_text() != _stamp(lock):
        say(f"making {folder} from {lock.name}")
        _run(uv, "venv", "-q", "--clear", "--python", sys.executable, str(folder))
        _run(uv, "pip", "sync", "-q", "--python", python, "--require-hashes", "--compile-bytecode", str(lock))
        stamp.write_text(_stamp(lock))
    install = ["pip", "install", "-q", "--python", python, "--no-deps", "--reinstall", "--compile-bytecode"]
    _run(uv, *install, str(_wheel(uv)))
    return folder
