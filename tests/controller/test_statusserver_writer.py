"""The writer: few writes, none lost that matters, no harm from conflicts, outages and other replicas. In real time."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from posttrain_api.records import Checkpoint, Report
from posttrain_operator.statusserver.bodies import Incoming
from posttrain_operator.statusserver.progress import rfc3339
from posttrain_operator.statusserver.view import JobView, ObjectMissing, WriteConflict, WriteRefused
from posttrain_operator.statusserver.writer import JobKey, ProgressWriter, WriterTiming, utc_now

KEY = JobKey("team", "job", "u1")
SLOW = WriterTiming(urgent_interval=0.2, min_interval=30, max_interval=60)
FAST = WriterTiming(urgent_interval=0.05, min_interval=0.1, max_interval=0.5, retry_first=0.05, retry_most=0.1)


class OneJob:
    """A job as API server and cache; `faults` are raised by the next writes in order; `follow`: the cache is fresh."""

    def __init__(self) -> None:
        self.stored = JobView("u1", "1", False)
        self.cached = self.stored
        self.follow = True
        self.writes: list[dict[str, Any]] = []
        self.faults: list[Exception] = []
        self.reads = 0

    async def look(self, namespace: str, name: str, pod: tuple[str, str]) -> None:
        """Everything is in memory."""

    def job(self, namespace: str, name: str) -> JobView | None:
        return self.cached if (namespace, name) == ("team", "job") else None

    def pod_uids(self, namespace: str, name: str) -> frozenset[str]:
        return frozenset({"p1"})

    async def read_job(self, namespace: str, name: str) -> JobView | None:
        self.reads += 1
        return self.stored

    async def apply_progress(self, namespace: str, name: str, version: str, progress: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        if self.faults:
            raise self.faults.pop(0)
        if version != self.stored.resource_version:
            raise WriteConflict(version)
        self.change(progress=progress)
        self.writes.append(progress)

    def change(self, **fields: Any) -> None:
        self.stored = replace(self.stored, resource_version=str(int(self.stored.resource_version) + 1), **fields)
        if self.follow:
            self.cached = self.stored


def training(step: int, **fields: Any) -> Incoming:
    return Incoming(Report(phase="Training", step=step, total_steps=100, **fields))


async def until(condition: Callable[[], bool], seconds: float = 2.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)


def made(job: OneJob, timing: WriterTiming = FAST) -> ProgressWriter:
    return ProgressWriter(job, job, timing)  # type: ignore[arg-type]


async def test_the_first_report_is_written_at_once() -> None:
    job = OneJob()
    made(job, SLOW).accept(KEY, training(1))
    await until(lambda: len(job.writes) == 1)
    assert job.writes[0]["display"] == "1 % 1/100"


async def test_a_stream_of_reports_gives_few_writes_and_the_newest_last() -> None:
    job = OneJob()
    writer = made(job)
    for step in range(1, 51):
        writer.accept(KEY, training(step))
        await asyncio.sleep(0.01)
    await until(lambda: job.writes[-1]["step"] == 50)
    assert 4 <= len(job.writes) <= 9
    steps = [each["step"] for each in job.writes]
    assert steps == sorted(steps)


async def test_what_nobody_sees_waits_longer() -> None:
    job = OneJob()
    writer = made(job)
    writer.accept(KEY, training(1, metrics={"loss": 2.0}))
    await until(lambda: len(job.writes) == 1)
    writer.accept(KEY, training(1, metrics={"loss": 1.0}))
    await asyncio.sleep(0.3)
    assert len(job.writes) == 1
    await until(lambda: len(job.writes) == 2)


@pytest.mark.parametrize("fields", [{"phase": "Saving"}, {"checkpoint": True}])
async def test_phase_and_checkpoint_do_not_wait(fields: dict[str, Any]) -> None:
    job = OneJob()
    writer = made(job, SLOW)
    writer.accept(KEY, training(1))
    await until(lambda: len(job.writes) == 1)
    known = Checkpoint(step=1, time="2026-01-01T00:00:00Z", uri="pvc://a/b", size_bytes=1, digest="d")
    update = {"checkpoint": known} if "checkpoint" in fields else fields
    writer.accept(KEY, Incoming(Report(**{"phase": "Training", "step": 1, "total_steps": 100, **update})))
    await until(lambda: len(job.writes) == 2)


async def test_a_conflict_is_read_again_and_retried() -> None:
    job = OneJob()
    writer = made(job)
    job.follow = False
    job.change()
    job.faults = [WriteConflict("1"), WriteConflict("2")]
    writer.accept(KEY, training(1))
    await until(lambda: len(job.writes) == 1)
    assert job.reads == 2


async def test_an_outage_delays_the_newest_report_only() -> None:
    job = OneJob()
    writer = made(job)
    job.faults = [OSError("refused"), OSError("refused")]
    writer.accept(KEY, training(1))
    await asyncio.sleep(0.02)
    writer.accept(KEY, training(2))
    await until(lambda: len(job.writes) == 1)
    assert job.writes[0]["step"] == 2


@pytest.mark.parametrize("error", [ObjectMissing("gone"), WriteRefused("500 failed to create typed patch object")])
async def test_what_can_never_be_written_is_dropped(error: Exception) -> None:
    job = OneJob()
    writer = made(job)
    job.faults = [error]
    writer.accept(KEY, training(1))
    await asyncio.sleep(0.2)
    assert (job.writes, job.faults) == ([], [])
    writer.accept(KEY, training(2))
    await until(lambda: len(job.writes) == 1)


async def test_a_job_made_anew_is_never_written_for_the_old_one() -> None:
    job = OneJob()
    writer = made(job)
    job.follow = False
    job.change(uid="u2")
    writer.accept(KEY, training(1))
    await asyncio.sleep(0.2)
    assert job.writes == []
    assert job.reads == 1


async def test_a_report_older_than_what_another_replica_wrote_is_dropped() -> None:
    job = OneJob()
    writer = made(job)
    writer.accept(KEY, training(1))
    await until(lambda: len(job.writes) == 1)
    writer.accept(KEY, training(2))
    newer = {**job.writes[0], "step": 3, "percent": 3, "lastUpdateTime": rfc3339(utc_now() + timedelta(seconds=0.05))}
    job.change(progress=newer)
    await asyncio.sleep(0.4)
    assert len(job.writes) == 1


async def test_two_replicas_keep_the_interval_together() -> None:
    job = OneJob()
    writers = [made(job), made(job)]
    for step in range(1, 51):
        writers[step % 2].accept(KEY, training(step))
        await asyncio.sleep(0.01)
    await until(lambda: job.writes[-1]["step"] >= 49)
    assert len(job.writes) <= 12


async def test_close_writes_what_is_pending() -> None:
    job = OneJob()
    writer = made(job)
    writer.accept(KEY, training(1))
    await until(lambda: len(job.writes) == 1)
    writer.accept(KEY, training(2))
    await writer.close()
    assert [each["step"] for each in job.writes] == [1, 2]


async def test_a_new_process_goes_on_from_what_the_job_says() -> None:
    job = OneJob()
    first = made(job)
    known = Checkpoint(step=1, time="2026-01-01T00:00:00Z", uri="pvc://a/b", size_bytes=1, digest="d")
    first.accept(KEY, training(5, checkpoint=known))
    await until(lambda: len(job.writes) == 1)
    second = made(job)
    second.accept(KEY, training(6))
    await until(lambda: len(job.writes) == 2)
    assert job.writes[1]["checkpoint"] == known.to_wire()


async def test_silent_jobs_are_forgotten() -> None:
    job = OneJob()
    writer = ProgressWriter(job, job, replace(FAST, forget_after=0.05))  # type: ignore[arg-type]
    writer.accept(KEY, training(1))
    await until(lambda: len(job.writes) == 1)
    await asyncio.sleep(0.1)
    writer.accept(JobKey("team", "other", "u9"), training(1))
    assert KEY not in writer._entries
