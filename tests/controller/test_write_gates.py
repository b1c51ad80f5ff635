"""Every write has a name and passes the gates; failpoints count them and die where they are told to."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain_operator.cluster import Cluster, Deletion
from posttrain_operator.cluster.api import Api
from posttrain_operator.cluster.errors import Unavailable
from posttrain_operator.cluster.failpoints import Failpoints
from posttrain_operator.cluster.kinds import CONFIG_MAP, EVENT, POD, PYTORCHJOB
from posttrain_operator.cluster.writes import Write, write_of


class Silent(Api):
    """Answers everything with an object, without a network."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self.sent: list[str] = []
        self.fails = False

    async def _send(self, method: str, url: str, body: Any, headers: Any) -> tuple[int, bytes, str | None]:
        self.sent.append(method)
        if self.fails:
            raise OSError("away")
        return 200, b'{"metadata": {"name": "x"}}', None


class Connected:
    server = "http://x"


def silent() -> Silent:
    api = Silent()
    api._connection = Connected()  # type: ignore[assignment]
    return api


class Recorder:
    def __init__(self) -> None:
        self.told: list[str] = []
        self.refuse = False

    def before(self, write: Write) -> None:
        if self.refuse:
            raise Unavailable(0, "NotLeading", str(write))
        self.told.append(f"before {write}")

    def after(self, write: Write) -> None:
        self.told.append(f"after {write}")


async def life(cluster: Cluster) -> None:
    """One of each write that the operator makes for a job."""
    await cluster.create(CONFIG_MAP, "ns", {"metadata": {"name": "job-config"}})
    await cluster.create(PYTORCHJOB, "ns", {"metadata": {"name": "job"}})
    await cluster.apply_status("ns", "job", {}, "posttrain-status", "7")
    await cluster.create(EVENT, "ns", {"metadata": {"name": "job.1234"}})
    await cluster.merge_patch(PYTORCHJOB, "ns", "job", {})
    await cluster.delete(POD, "ns", "job-worker-0", Deletion("u"))
    await cluster.apply(CONFIG_MAP, "ns", {"metadata": {"name": "job-status-ca"}}, "posttrain-operator")
    await cluster.get(POD, "ns", "job-worker-0")


NAMES = [
    "POST configmaps config",
    "POST pytorchjobs",
    "PATCH posttrainingjobs/status posttrain-status",
    "POST events",
    "PATCH pytorchjobs",
    "DELETE pods",
    "PATCH configmaps status-ca",
]


async def test_every_write_has_a_name_and_reads_have_none() -> None:
    api, gate = silent(), Recorder()
    api.gates.append(gate)
    await life(Cluster(api))
    assert gate.told == [f"{moment} {name}" for name in NAMES for moment in ("before", "after")]


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("POST", "/apis/authentication.k8s.io/v1/tokenreviews", Write("POST", "tokenreviews", "", "")),
        ("PUT", "/api/v1/namespaces/sys/secrets/keys", Write("PUT", "secrets", "sys", "keys")),
        ("PUT", "/apis/coordination.k8s.io/v1/namespaces/sys/leases/l", Write("PUT", "leases", "sys", "l")),
        ("DELETE", "/api/v1/namespaces/ns", Write("DELETE", "namespaces", "", "ns")),
    ],
)
def test_paths_are_read(method: str, path: str, expected: Write) -> None:
    assert write_of(method, path, None) == expected


async def test_a_gate_that_refuses_keeps_the_write_here() -> None:
    api, gate = silent(), Recorder()
    api.gates.append(gate)
    gate.refuse = True
    with pytest.raises(Unavailable):
        await Cluster(api).create(PYTORCHJOB, "ns", {"metadata": {"name": "job"}})
    assert api.sent == []
    assert await Cluster(api).get(POD, "ns", "x")


async def test_a_write_that_fails_is_over_too() -> None:
    api, gate = silent(), Recorder()
    api.gates.append(gate)
    api.fails = True
    with pytest.raises(Unavailable):
        await Cluster(api).create(PYTORCHJOB, "ns", {"metadata": {"name": "job"}})
    assert gate.told == ["before POST pytorchjobs", "after POST pytorchjobs"]


async def test_failpoints_are_told_and_one_is_deadly(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    deaths: list[int] = []
    api = silent()
    api.gates.append(Failpoints("POST pytorchjobs#2:after", lambda: deaths.append(len(api.sent))))
    await life(Cluster(api))
    assert deaths == []
    await life(Cluster(api))
    points = [record.message.removeprefix("failpoint ") for record in caplog.records if "failpoint" in record.message]
    assert points[:4] == [f"{name}#1:{moment}" for name in NAMES[:2] for moment in ("before", "after")]
    assert len(points) == 2 * 2 * len(NAMES)
    assert deaths == [8 + 2]


@pytest.mark.parametrize("body", [b"<html>proxy</html>", b'{"metadata": {"na', b"[]"])
async def test_an_answer_that_is_no_object_is_no_answer(body: bytes) -> None:
    """A proxy's page with code 200, or an answer that breaks off: the API server did not speak."""

    class Garbled(Silent):
        async def _send(self, method: str, url: str, body_: Any, headers: Any) -> tuple[int, bytes, str | None]:
            return 200, body, None

    api = Garbled()
    api._connection = Connected()  # type: ignore[assignment]
    with pytest.raises(Unavailable, match="no JSON object"):
        await api.request("GET", "/version")
