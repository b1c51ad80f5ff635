"""The job's ConfigMap with the CA bundle: made, renewed, and never taken from somebody else."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain_operator.actions import Actions, Create, Object
from posttrain_operator.backends.configmaps import status_ca
from posttrain_operator.backends.owned import owner_reference, status_ca_name
from posttrain_operator.cache import Cache
from posttrain_operator.cluster import Cluster
from posttrain_operator.cluster.errors import AlreadyExists, Forbidden
from posttrain_operator.execute import Executor
from posttrain_operator.findings import Findings
from posttrain_operator.recorder import Recorder
from posttrain_operator.records import Key
from posttrain_operator.slim import job_record

Json = dict[str, Any]
KEY = Key("ns", "job")
JOB = job_record({"metadata": {"name": "job", "namespace": "ns", "uid": "u", "resourceVersion": "1"}, "spec": {}})
WANTED = Actions(
    create=(Create(Object.CONFIG_MAP, status_ca_name("job"), status_ca("ns", "job", "u", "NEW"), upsert=True),)
)


class Maps:
    """An API server with room for one ConfigMap."""

    def __init__(self, there: Json | None = None, full: bool = False) -> None:
        self.there, self.full = there, full

    async def request(self, method: str, path: str, *, body: Any = None, **_: Any) -> Json:
        if method == "POST" and self.full:
            raise Forbidden(403, "Forbidden", "exceeded quota: maps")
        if method == "POST" and self.there:
            raise AlreadyExists(409, "AlreadyExists", "taken")
        if method in ("POST", "PATCH"):
            self.there = body
        assert self.there is not None
        return self.there


async def published(maps: Maps) -> str | None:
    """The bundle that the operator believes to be there after one pass, which never fails for it."""
    findings = Findings(60, lambda: 0.0)
    cluster = Cluster(maps)  # type: ignore[arg-type]
    assert await Executor(cluster, Cache(), findings, Recorder(cluster)).execute(JOB, WANTED)
    known = findings.published.get(KEY)
    return known.bundle if known else None


@pytest.mark.parametrize("there", [None, status_ca("ns", "job", "u", "OLD")])
async def test_it_is_made_and_renewed(there: Json | None) -> None:
    maps = Maps(there)
    assert await published(maps) == "NEW"
    assert maps.there is not None
    assert maps.there["data"] == {"ca.crt": "NEW"}


@pytest.mark.parametrize("owners", [[], [owner_reference("job", "another")]])
async def test_somebody_elses_is_left_alone(owners: list[Json]) -> None:
    theirs = {"metadata": {"name": "job-status-ca", "ownerReferences": owners}, "data": {"x": "y"}}
    maps = Maps(dict(theirs))
    assert await published(maps) is None
    assert maps.there == theirs


async def test_without_it_the_job_goes_on() -> None:
    assert await published(Maps(full=True)) is None
