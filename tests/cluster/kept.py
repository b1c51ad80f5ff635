"""An operator that is started again whenever it ends, as the kubelet does, with a note of how it ended."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from operator_kit import ACCOUNT, SYSTEM, Operator, wait_for

from devcluster.testing import Cluster


class Kept:
    """`ends`: the exit codes so far. The n-th process gets the n-th of `environs`, later ones the last."""

    def __init__(self, kubeconfig: Path, folder: Path, environs: list[dict[str, str]]) -> None:
        self._kubeconfig, self._folder, self._environs = kubeconfig, folder, environs
        self.ends: list[int] = []
        self._begun = 0
        self._stopping = threading.Event()
        self.running = self._begin()
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._thread.start()

    @property
    def logs(self) -> list[str]:
        """What each process has said."""
        return [(self._folder / f"operator-{number}.log").read_text() for number in range(self._begun)]

    def _begin(self) -> Operator:
        environ = self._environs[min(self._begun, len(self._environs) - 1)]
        begun = Operator(self._kubeconfig, self._folder / f"operator-{self._begun}.log", **environ)
        self._begun += 1
        return begun

    def _keep(self) -> None:
        while not self._stopping.wait(0.05):
            code = self.running.process.poll()
            if code is not None:
                self.ends.append(code)
                self.running = self._begin()

    def ready(self, timeout: float = 60) -> Kept:
        """Waits until the process that runs now is ready."""
        wait_for(self._is_ready, f"the operator to be ready: {self.logs[-1][-3000:]}", timeout)
        return self

    def _is_ready(self) -> bool:
        running = self.running
        return running.process.poll() is None and "ready after" in running.log.read_text()

    def died(self, times: int, timeout: float = 60) -> None:
        """Waits until so many processes have ended."""
        wait_for(lambda: len(self.ends) >= times, f"{times} ends, so far {self.ends}: {self.logs[-1][-3000:]}", timeout)

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self.running.stop(signal.SIGKILL)


def allow_any_lease(cluster: Cluster) -> None:
    """Operators of several tests may live at once, each with a lease of its own; the chart allows one name only."""
    role = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]}
    where = {"name": "any-lease", "namespace": SYSTEM}
    api = "rbac.authorization.k8s.io"
    account = {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": SYSTEM}
    binding = {"subjects": [account], "roleRef": {"apiGroup": api, "kind": "Role", "name": "any-lease"}}
    cluster.apply(
        {"apiVersion": f"{api}/v1", "kind": "Role", "metadata": where, "rules": [role]},
        {"apiVersion": f"{api}/v1", "kind": "RoleBinding", "metadata": where, **binding},
    )


@contextlib.contextmanager
def kept(kubeconfig: Path, folder: Path, *environs: dict[str, str]) -> Iterator[Kept]:
    """An operator that is kept running until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    running = Kept(kubeconfig, folder, list(environs) or [{}])
    try:
        yield running
    finally:
        running.stop()
