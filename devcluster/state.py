"""What a cluster is and where its files lie.

Every other module takes a `ClusterSpec` (what was asked for) and asks it for paths; nothing else knows the layout of
the state folder. The spec is written once by the launcher and read by the supervisor, so both speak of the same thing.
"""

import fcntl
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from devcluster.errors import DevclusterError

SERVICE_RANGE = "10.96.0.0/16"
API_SERVICE_IP = "10.96.0.1"
POD_PREFIX = 16
BRIDGE_IP = "10.244.0.1"
CLUSTER_DOMAIN = "cluster.local"


@dataclass(frozen=True)
class ClusterSpec:
    """What `up` was asked for. `host_network`: the control plane listens on 127.0.0.1 itself, nothing forwards."""

    name: str
    state: str
    nodes: int = 2
    gpus_per_node: int = 8
    control_plane_only: bool = False
    host_network: bool = False
    forwards: tuple[str, ...] = ()
    images: dict[str, dict[str, object]] = field(default_factory=dict)
    crds: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    """What it has besides: names of binaries.EXTRAS."""
    audit: bool = False
    """The API server keeps a log of every write: see `audit`."""
    init_image: str = "devcluster/tools:dev"

    @property
    def root(self) -> Path:
        """The state folder."""
        return Path(self.state)

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig, for use outside the namespace."""
        return self.root / "kubeconfig"

    @property
    def ready_file(self) -> Path:
        return self.root / "ready.json"

    @property
    def failed_file(self) -> Path:
        return self.root / "failed.txt"

    @property
    def progress_file(self) -> Path:
        return self.logs / "progress.log"

    @property
    def volumes(self) -> Path:
        """Persistent volumes: one folder each."""
        return self.root / "volumes"

    @property
    def pods(self) -> Path:
        return self.root / "pods"

    def save(self) -> None:
        """Write the spec into the state folder, made here when missing."""
        self.logs.mkdir(parents=True, exist_ok=True)
        (self.root / "spec.json").write_text(json.dumps(asdict(self), indent=1))

    def ready(self) -> dict[str, object]:
        """What the supervisor wrote when everything was Ready."""
        if not self.ready_file.exists():
            raise DevclusterError(f"cluster {self.name!r} in {self.state} is not ready; start it with `up`")
        return dict(json.loads(self.ready_file.read_text()))


def default_state(name: str) -> Path:
    """The state folder of a cluster that was given only a name."""
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base) / "posttrain-devcluster" / name


def load_spec(state: Path) -> ClusterSpec:
    """Read a cluster's spec back; raises DevclusterError when there is none."""
    path = state / "spec.json"
    if not path.exists():
        raise DevclusterError(f"{path}: no cluster here; start one with `python -m devcluster up`")
    raw = json.loads(path.read_text())
    for name in ("forwards", "crds", "extras"):
        raw[name] = tuple(raw[name])
    return ClusterSpec(**raw)


def take_lock(spec: ClusterSpec) -> IO[str] | None:
    """The supervisor's lock, held for its whole life; None when another process holds it."""
    handle = open(spec.root / "lock", "a+")  # noqa: SIM115 - kept open on purpose: closing it gives the lock up
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    handle.seek(0)
    handle.truncate()
    return handle


def running_pid(spec: ClusterSpec) -> int | None:
    """The supervisor's pid, or None when none holds the lock. A stale pid file alone proves nothing."""
    path = spec.root / "lock"
    if not path.exists():
        return None
    with open(path) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = handle.read().strip()
            return int(text) if text else None
    return None
