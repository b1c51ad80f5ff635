"""What each refusal of the API server does to a key, to the others, and to the cache."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from model_cluster import PLAN, SPEC

from posttrain_operator.actions import Actions, Delete, Object
from posttrain_operator.cache import Cache
from posttrain_operator.cluster import Cluster
from posttrain_operator.cluster.errors import (
    AlreadyExists,
    ApiError,
    BadBody,
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    ServerError,
    Unavailable,
    WebhookFailed,
    error_of,
)
from posttrain_operator.execute import Executor
from posttrain_operator.facts import JobFacts
from posttrain_operator.findings import Findings
from posttrain_operator.observe import Observer
from posttrain_operator.recorder import Recorder
from posttrain_operator.records import Key
from posttrain_operator.settings import Settings, Timing
from posttrain_operator.slim import job_record
from posttrain_operator.worker import Stuck, Worker, look_for_hangs
from posttrain_operator.workqueue import Backoff, WorkQueue

KEY = Key("ns", "job")
Json = dict[str, Any]


class Api:
    """Answers like an API server that has the claim and nothing else; `refuse` is asked first."""

    def __init__(self, refuse: Callable[[str, str], ApiError | None] = lambda method, path: None) -> None:
        self.refuse = refuse
        self.requests: list[tuple[str, str]] = []

    async def request(self, method: str, path: str, *, body: Any = None, **_: Any) -> Json:
        self.requests.append((method, path))
        if problem := self.refuse(method, path):
            raise problem
        if method == "GET":
            return {"metadata": {"uid": "x", "name": "x"}}
        version = str(100 + len(self.requests))
        metadata = {"uid": "made", "resourceVersion": version, **(body or {}).get("metadata", {})}
        return {**(body or {}), "metadata": {**metadata, "resourceVersion": version}}

    def writes(self, fragment: str) -> int:
        return sum(1 for method, path in self.requests if method != "GET" and fragment in path)


class Counter:
    def __init__(self) -> None:
        self.errors: list[str | None] = []

    def reconciled(self, seconds: float, error: str | None) -> None:
        self.errors.append(error)

    def transitioned(self, job: JobFacts, actions: Actions) -> None:
        """Not of interest."""


class Rig:
    """A worker on an Api; the cache holds one new job."""

    def __init__(self, api: Api) -> None:
        self.api, self.cache, self.counter = api, Cache(), Counter()
        self.queue: WorkQueue[Key] = WorkQueue(Backoff(0.01, 0.02))
        findings = Findings(60, lambda: 0.0)
        cluster = Cluster(api)  # type: ignore[arg-type]
        settings = Settings(namespace="sys", plan=PLAN, timing=Timing())
        observer = Observer(cluster, self.cache, findings, settings, lambda: None)
        self.executor = Executor(cluster, self.cache, findings, Recorder(cluster))
        self.worker = Worker(self.queue, self.cache, observer, self.executor, self.counter)
        self.cache.put_job(job_record(self._manifest()))
        self.queue.add(KEY)

    def _manifest(self) -> Json:
        metadata = {"name": "job", "namespace": "ns", "uid": "u", "resourceVersion": "1", "generation": 1}
        return {"apiVersion": "posttrain.dev/v1alpha1", "kind": "PostTrainingJob", "metadata": metadata, "spec": SPEC}

    async def work(self, seconds: float = 0.3) -> None:
        task = asyncio.create_task(self.worker.run())
        await asyncio.sleep(seconds)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):  # it was we who ended it
            await task

    @property
    def status(self) -> Json:
        return dict(self.cache.jobs[KEY].manifest()["status"])


def once(kind: type[ApiError], status: int, method: str, fragment: str) -> Callable[[str, str], ApiError | None]:
    """Refuses the first matching request."""
    left = [kind(status, "r", "message", 0.01)]

    def refuse(asked: str, path: str) -> ApiError | None:
        return left.pop() if left and asked == method and fragment in path else None

    return refuse


async def test_a_job_is_started_with_three_writes_and_events() -> None:
    rig = Rig(Api())
    await rig.work()
    assert (rig.api.writes("/configmaps"), rig.api.writes("/pytorchjobs"), rig.api.writes("/status")) == (1, 1, 1)
    assert rig.status["backend"]["uid"] == "made"


@pytest.mark.parametrize(
    ("kind", "status", "method", "fragment"),
    [
        (Conflict, 409, "PATCH", "/status"),
        (ServerError, 500, "POST", "/pytorchjobs"),
        (Unavailable, 503, "POST", "/configmaps"),
        (Unavailable, 429, "GET", "/persistentvolumeclaims"),
        (NotFound, 404, "POST", "/pytorchjobs"),
    ],
)
async def test_what_passes_is_tried_again(kind: type[ApiError], status: int, method: str, fragment: str) -> None:
    rig = Rig(Api(once(kind, status, method, fragment)))
    await rig.work(0.5)
    assert rig.status["state"] == "Pending"
    assert kind.__name__ in rig.counter.errors


async def test_our_own_bad_body_is_not_tried_again() -> None:
    def refuse(method: str, path: str) -> ApiError | None:
        return BadBody(500, "", "failed to create typed patch object") if "/status" in path else None

    rig = Rig(Api(refuse))
    await rig.work()
    assert rig.counter.errors.count("BadBody") == 1


@pytest.mark.parametrize(
    ("kind", "fragment", "error", "reason"),
    [
        ("PyTorchJob", "/pytorchjobs", Forbidden(403, "Forbidden", "exceeded quota: jobs"), "QuotaExceeded"),
        ("ConfigMap", "/configmaps", Forbidden(403, "Forbidden", "exceeded quota: maps"), "QuotaExceeded"),
        ("PyTorchJob", "/pytorchjobs", WebhookFailed(500, "", "failed calling webhook: refused"), "BackendMissing"),
    ],
)
async def test_a_refused_creation_stalls_the_job(kind: str, fragment: str, error: ApiError, reason: str) -> None:
    """And says so from the first moment: a job without a status explains nothing."""
    rig = Rig(Api(lambda method, path: error if method == "POST" and fragment in path else None))
    await rig.work()
    assert (rig.status["reason"], rig.status["state"]) == (reason, "Pending")
    assert f"refused the {kind}" in rig.status["message"]
    assert {c["type"] for c in rig.status["conditions"] if c["status"] == "True"} == {"Validated", "Stalled"}


async def test_a_child_that_is_ours_already_is_taken() -> None:
    """The process died between the creation and the status."""

    class Later(Api):
        async def request(self, method: str, path: str, *, body: Any = None, **rest: Any) -> Json:
            if method == "GET" and path.endswith("/pytorchjobs/job"):
                owner = {"uid": "u", "controller": True}
                metadata = {"name": "job", "namespace": "ns", "uid": "old", "resourceVersion": "7"}
                return {"metadata": {**metadata, "ownerReferences": [owner]}, "spec": {}}
            return await super().request(method, path, body=body, **rest)

    rig = Rig(Later(once(AlreadyExists, 409, "POST", "/pytorchjobs")))
    await rig.work()
    # It carries no spec hash of ours: the plan is another one, so it is deleted, which this API server does not do.
    assert [child.uid in ("old", "made") for child in rig.cache.children(KEY)] == [True]
    assert rig.api.writes("/pytorchjobs") >= 2


async def test_a_child_that_the_watch_has_lost_from_sight_is_no_loop() -> None:
    """Somebody took our label off it: to a watch that selects by it this is a deletion."""

    class Hidden(Api):
        async def request(self, method: str, path: str, *, body: Any = None, **rest: Any) -> Json:
            its = "/pytorchjobs" in path
            if its and method == "GET":
                owner = {"uid": "u", "controller": True}
                metadata = {"name": "job", "namespace": "ns", "uid": "c", "resourceVersion": "7"}
                return {"kind": "PyTorchJob", "metadata": {**metadata, "ownerReferences": [owner]}, "spec": {}}
            answer = await super().request(method, path, body=body, **rest)
            if its and method == "POST":
                raise AlreadyExists(409, "AlreadyExists", "it exists")
            return answer

    rig = Rig(Hidden())
    rig.cache.drop_child(KEY, "c")
    await rig.work()
    assert rig.api.writes("/pytorchjobs") == 1
    assert (rig.status["reason"], rig.status["state"]) == ("NameConflict", "Pending")
    assert "a PyTorchJob named job whose labels somebody has changed exists" in rig.status["message"]


@pytest.mark.parametrize(
    ("problem", "then"),
    [
        (None, ["pytorchjobs"]),
        (ServerError(500, "r", "message", 0.01), []),
        (Forbidden(403, "Forbidden", "a policy"), ["pytorchjobs"]),
    ],
)
async def test_the_child_is_deleted_last(problem: ApiError | None, then: list[str]) -> None:
    """It is what shows, after a death in between, that something is left to be deleted; but what is refused for good
    does not keep its pods."""
    api = Api(lambda method, path: problem if method == "DELETE" and "/configmaps" in path else None)
    rig = Rig(api)
    both = (Delete(Object.PYTORCHJOB, "job", "c"), Delete(Object.CONFIG_MAP, "job-config", "m"))
    with pytest.raises(type(problem)) if problem else contextlib.nullcontext():
        await rig.executor.execute(rig.cache.jobs[KEY], Actions(delete=both))
    deleted = [path.split("/")[-2] for method, path in api.requests if method == "DELETE"]
    assert deleted == ["configmaps", *then]


async def test_an_unexpected_error_ends_nothing() -> None:
    rig = Rig(Api())
    rig.cache.put_job(
        job_record(
            {**rig._manifest(), "spec": None, "metadata": {**rig._manifest()["metadata"], "resourceVersion": "2"}}
        )
    )
    await rig.work()
    assert rig.counter.errors


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (409, b'{"reason": "AlreadyExists"}', AlreadyExists),
        (409, b'{"reason": "Conflict"}', Conflict),
        (404, b"{}", NotFound),
        (403, b"{}", Forbidden),
        (422, b"{}", Invalid),
        (400, b"{}", Invalid),
        (429, b"", Unavailable),
        (503, b"<html>", Unavailable),
        (500, b'{"message": "failed to create typed patch object (x): .status.y: field not declared"}', BadBody),
        (500, b'{"message": "Internal error occurred: failed calling webhook"}', WebhookFailed),
        (500, b'{"message": "etcdserver: request timed out"}', ServerError),
    ],
)
def test_answers_become_types(status: int, body: bytes, kind: type[ApiError]) -> None:
    assert type(error_of(status, body, "3")) is kind
    assert error_of(status, body, "3").retry_after == 3


def manifest(version: str, **status: Any) -> Json:
    metadata = {"name": "job", "namespace": "ns", "uid": "u", "resourceVersion": version, "generation": 1}
    kind = {"apiVersion": "posttrain.dev/v1alpha1", "kind": "PostTrainingJob"}
    return {**kind, "metadata": metadata, "spec": SPEC, "status": status}


class Newer(Api):
    """The job has a version that no watch has told of; `present`: whether the job, and whether its kind is there."""

    def __init__(self, job: bool = True, kind: bool = True) -> None:
        super().__init__()
        self.job, self.kind = job, kind

    async def request(self, method: str, path: str, *, body: Any = None, **rest: Any) -> Json:
        if method == "PATCH" and path.endswith("/status") and not (self.job and self.kind):
            raise NotFound(404, "NotFound", "no such job")
        if method == "PATCH" and path.endswith("/status") and body["metadata"]["resourceVersion"] == "1":
            raise Conflict(409, "Conflict", "the object has been modified")
        if method == "GET" and path.endswith("/posttrainingjobs/job"):
            return manifest("7") if self.job and self.kind else self._absent()
        if method == "GET" and path == "/apis/posttrain.dev/v1alpha1":
            return {"resources": [{"name": "posttrainingjobs"}]} if self.kind else self._absent()
        if method == "GET" and ("pytorchjobs/" in path or "trainjobs/" in path):
            return self._absent()
        return await super().request(method, path, body=body, **rest)

    def _absent(self) -> Json:
        raise NotFound(404, "NotFound", "absent")


async def test_a_watch_that_lags_behind_is_not_waited_for_for_ever() -> None:
    """Races are lost again and again: the job is read, and what is read is worked on."""
    rig = Rig(Newer())
    await rig.work(2)
    assert rig.status["state"] == "Pending"
    assert 3 <= rig.counter.errors.count("Conflict") <= 5


async def test_a_job_that_is_gone_unseen_is_dropped() -> None:
    rig = Rig(Newer(job=False))
    await rig.work(0.6)
    assert KEY not in rig.cache.jobs
    assert rig.counter.errors.count("NotFound") <= 3


async def test_a_kind_that_is_not_served_for_a_moment_drops_nothing() -> None:
    """What is taken for deleted never comes back: an API server that has only just started may not know it yet."""
    rig = Rig(Newer(kind=False))
    await rig.work(0.6)
    assert KEY in rig.cache.jobs


async def test_idle_workers_feel_the_brake_too() -> None:
    """They wait for a key, not for the brake, when it is pulled."""
    rig = Rig(Api())
    rig.queue.done(await rig.queue.get())
    task = asyncio.create_task(rig.worker.run())
    await asyncio.sleep(0.05)
    rig.worker.brake.pull(30.0)
    rig.queue.add(KEY)
    await asyncio.sleep(0.2)
    assert rig.api.requests == []
    assert rig.worker.longest() < 0.05
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):  # it was we who ended it
        await task


async def test_a_pass_that_never_ends_ends_the_process() -> None:
    class Hanging(Api):
        async def request(self, *_: Any, **__: Any) -> Json:
            await asyncio.Event().wait()
            raise AssertionError

    rig = Rig(Hanging())
    task = asyncio.create_task(rig.worker.run())
    with pytest.raises(Stuck):
        await look_for_hangs(rig.worker, Timing().scaled(0.0005))
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):  # it was we who ended it
        await task
