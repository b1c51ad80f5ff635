"""Clusters for tests: `with control_plane() as cluster: cluster.kubectl("get", "ns")`.

`control_plane()` is etcd, the API server and the few controllers that the API itself needs: ready in a few seconds.
`cluster()` is everything, with nodes that run pods. Both end with the `with` block, and with the test process however
it ends. Meant for session-scoped pytest fixtures; several may run at the same time.
"""

import contextlib
import json
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from devcluster import binaries, control, launcher
from devcluster.reading import Reader
from devcluster.state import ClusterSpec


@dataclass(frozen=True)
class Cluster:
    """A running cluster. `kubeconfig` works from outside the cluster's namespace, with administrator's rights."""

    spec: ClusterSpec

    @property
    def kubeconfig(self) -> Path:
        return self.spec.kubeconfig

    @property
    def server(self) -> str:
        """The API server's address on 127.0.0.1."""
        return str(self.spec.ready()["api"])

    @cached_property
    def read(self) -> Reader:
        """For reads that are repeated: kubectl costs fifty times as much."""
        return Reader(self.spec)

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True, timeout: float = 120) -> str:
        """Run kubectl and return its stdout; raises RuntimeError with its stderr unless `check` is off."""
        command = [str(binaries.binary("kubectl")), f"--kubeconfig={self.kubeconfig}", *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
        if check and done.returncode != 0:
            raise RuntimeError(f"kubectl {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout if check else done.stdout + done.stderr

    def apply(self, *objects: dict[str, Any] | str) -> str:
        """kubectl apply --server-side of dictionaries or YAML texts."""
        texts = [each if isinstance(each, str) else json.dumps(each) for each in objects]
        return self.kubectl("apply", "--server-side", "-f", "-", stdin="\n---\n".join(texts))

    def get(self, *arguments: str) -> dict[str, Any]:
        """kubectl get ... -o json, parsed."""
        return dict(json.loads(self.kubectl("get", *arguments, "-o", "json")))

    def ask(self, action: str, **values: Any) -> Any:
        """A fault or another request of `devcluster.faults`, such as ask("oom", pod="x", namespace="y")."""
        return control.ask(self.spec, action, **values)

    def helm(self, *arguments: str, timeout: float = 180) -> str:
        """Run helm against this cluster and return its stdout."""
        binaries.ensure(["helm"])
        command = [str(binaries.binary("helm")), f"--kubeconfig={self.kubeconfig}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"helm {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout


@contextlib.contextmanager
def _running(state: Path | None, **options: Any) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="devcluster-")) if state is None else state
    name = options.pop("name", None) or f"test-{uuid.uuid4().hex[:8]}"
    spec = ClusterSpec(name=name, state=str(folder.resolve()), **options)
    supervisor = launcher.start(spec, print, kept=True)
    try:
        yield Cluster(spec)
    finally:
        launcher.stop(spec)
        if supervisor.stdin:
            supervisor.stdin.close()
        supervisor.wait()
        if state is None:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def control_plane(
    state: Path | None = None, name: str | None = None, crds: Sequence[Path] = (), **options: bool
) -> Iterator[Cluster]:
    """API server and etcd only, with garbage collection, namespaces and service accounts: no nodes, nothing runs.

    `crds` are files installed before the controllers start; children of a kind that comes later are garbage-collected
    only some 30 s after their owner. Options: `host_network` keeps it on 127.0.0.1, where nothing
    forwards, for benchmarks; `audit` keeps a log of all writes.
    """
    files = tuple(str(path) for path in crds)
    with _running(state, name=name, control_plane_only=True, crds=files, **options) as running:
        yield running


@contextlib.contextmanager
def full_cluster(state: Path | None = None, name: str | None = None, **options: Any) -> Iterator[Cluster]:
    """Everything: nodes that run pods, training-operator, storage. `options` are fields of ClusterSpec."""
    with _running(state, name=name, **options) as running:
        yield running
