"""Two operators on one API server, and what its audit log says that each of them has written."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import ssl
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from operator_kit import LEASE, SYSTEM, Operator, operator_kubeconfig, wait_for

from devcluster import audit
from devcluster.testing import Cluster

PATIENCE = 90.0
LEASE_SECONDS = 60
"""At a tenth of the scale: a lease of 6 s, 4 s to renew it, 0.8 s between renewals."""
REAL = LEASE_SECONDS * 0.1
SECRET = "posttrain-operator-status"
_IDENTITY = re.compile(r"this replica is (\S+)")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Replica(Operator):
    """One of two."""

    def __init__(self, kubeconfig: Path, log: Path, **environ: str) -> None:
        self.port, self.status_port = free_port(), free_port()
        own = {
            "LEASE_SECONDS": str(LEASE_SECONDS),
            "METRICS_PORT": str(self.port),
            "STATUS_PORT": str(self.status_port),
            "STATUS_SECRET": SECRET,
            "STATUS_URL": f"https://posttrain-operator.{SYSTEM}.svc:10443",
        }
        super().__init__(kubeconfig, log, queues=True, **{**own, **environ})

    @property
    def identity(self) -> str:
        found = wait_for(lambda: _IDENTITY.search(self.log.read_text()), "a look at the lease", PATIENCE)
        return str(found[1])

    def stands_by(self) -> Replica:
        wait_for(lambda: "leads, this replica is" in self.log.read_text(), "another one to lead", PATIENCE)
        return self

    def http(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def certificate(self) -> str:
        """The one that its status server shows; empty while it does not serve."""
        try:
            return ssl.get_server_certificate(("127.0.0.1", self.status_port), timeout=10)
        except OSError:
            return ""

    def gauge(self, name: str) -> float:
        found = re.search(rf"^posttraining_{name} (\S+)$", self.http("/metrics"), re.MULTILINE)
        assert found, name
        return float(found[1])


def replica(cluster: Cluster, folder: Path, name: str, kubeconfig: Path | None = None, **environ: str) -> Replica:
    folder.mkdir(parents=True, exist_ok=True)
    return Replica(kubeconfig or operator_kubeconfig(cluster, folder), folder / f"{name}.log", **environ)


@contextlib.contextmanager
def two(
    cluster: Cluster, folder: Path, kubeconfig: Path | None = None, **environ: str
) -> Iterator[tuple[Replica, Replica]]:
    """A leader with complete lists, and a standby; both end with the block. `kubeconfig`: the leader's way to the API
    server."""
    cluster.kubectl("delete", "lease", LEASE, "-n", SYSTEM, "--ignore-not-found")
    begun = [replica(cluster, folder / "a", "first", kubeconfig, **environ)]
    try:
        begun[0].ready(PATIENCE)
        begun.append(replica(cluster, folder / "b", "second", **environ))
        yield begun[0], begun[1].stands_by()
    finally:
        for each in begun:
            each.stop(signal.SIGKILL)


@dataclass(frozen=True)
class Entry:
    """A write that succeeded. `agent` names the replica that sent it."""

    agent: str
    verb: str
    resource: str
    namespace: str
    name: str
    sent: datetime
    answered: datetime

    def by(self, identity: str) -> bool:
        return f"({identity})" in self.agent


def entry_of(found: dict[str, Any]) -> Entry | None:
    """None for what was refused."""
    if found["responseStatus"].get("code", 0) >= 400:
        return None
    about = found.get("objectRef") or {}
    resource = "/".join(part for part in (about.get("resource", ""), about.get("subresource")) if part)
    times = (datetime.fromisoformat(found[key]) for key in ("requestReceivedTimestamp", "stageTimestamp"))
    agent, name = found.get("userAgent", ""), about.get("name", "")
    return Entry(agent, found["verb"], resource, about.get("namespace", ""), name, *times)


def written(cluster: Cluster) -> list[Entry]:
    """Every write so far that succeeded, in order."""
    return [entry for found in audit.entries(cluster.spec.root) if (entry := entry_of(found))]


def acquired(entries: list[Entry], identity: str) -> Entry:
    """The first time that a replica got the lease."""
    return next(each for each in entries if each.resource == "leases" and each.name == LEASE and each.by(identity))


def last_of_lease(entries: list[Entry], identity: str) -> Entry:
    return [each for each in entries if each.resource == "leases" and each.by(identity)][-1]


def no_double_action(cluster: Cluster, namespace: str, leaders: list[Replica]) -> list[Entry]:
    """The law: each object was created once, and no leader wrote anything after its successor had the lease."""
    entries = written(cluster)
    made = Counter(
        (each.resource, each.name)
        for each in entries
        if each.verb == "create" and each.namespace == namespace and "posttrain-operator (" in each.agent
    )
    assert made, "nothing was created by an operator"
    assert {what: count for what, count in made.items() if count > 1} == {}
    for old, new in pairwise(leaders):
        since = acquired(entries, new.identity).answered
        late = [each for each in entries if each.by(old.identity) and each.answered > since]
        assert late == []
    return entries


def lease_holder(cluster: Cluster) -> str:
    found = cluster.kubectl("get", "lease", LEASE, "-n", SYSTEM, "-o=jsonpath={.spec.holderIdentity}", check=False)
    return found.strip()
