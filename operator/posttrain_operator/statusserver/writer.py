"""Writes status.progress: few writes per job however many reports come in.

The handlers hand over every accepted report with `accept`, which returns at once; one task per job with something to
write decides when. What a person or the control loop waits for (first report, phase, checkpoint, facts) goes out at
once, a changed percentage at most every `min_interval`, anything else every `max_interval`. Only the newest report
of a job is kept. A report that is lost is no fact lost: trainers repeat what they know. The previous progress comes
from the view wherever that is newer, so replicas need not know of each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from posttrain_operator.clock import SteadyClock
from posttrain_operator.statusserver import progress
from posttrain_operator.statusserver.bodies import Incoming
from posttrain_operator.statusserver.view import (
    JobsView,
    JobView,
    ObjectMissing,
    StatusCluster,
    WriteConflict,
    WriteRefused,
)

log = logging.getLogger(__name__)
_NEVER = datetime.min.replace(tzinfo=UTC)
_SKEW = 60.0
"""Seconds that two replicas' clocks, and their reports' ways, may differ by."""
_CONFLICT_TRIES = 6
_CONFLICT_PAUSE = 0.02
"""Seconds before the second try, doubled each time: the other writer is our own control loop."""


@dataclass(frozen=True)
class WriterTiming:
    """Seconds. `forget_after`: how long a silent job stays in memory."""

    urgent_interval: float = 2.0
    min_interval: float = 10.0
    max_interval: float = 60.0
    retry_first: float = 1.0
    retry_most: float = 60.0
    forget_after: float = 600.0


@dataclass(frozen=True)
class JobKey:
    """A job by identity: one of the same name that was made anew is another job."""

    namespace: str
    name: str
    uid: str


@dataclass
class _Entry:
    pending: tuple[Incoming | None, datetime] | None = None
    """A report and when it came; None in its place: only stacks are to be written."""
    stacks: dict[int, str] = field(default_factory=dict)
    written: Mapping[str, Any] | None = None
    touched: datetime = _NEVER
    retry_at: datetime | None = None
    failures: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


utc_now = SteadyClock()
"""The wall clock without its jumps: written times are compared with other replicas' and with the trainer's."""


class ProgressWriter:
    """One per process. `close` writes what is still pending, once."""

    def __init__(
        self,
        cluster: StatusCluster,
        view: JobsView,
        timing: WriterTiming | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._cluster = cluster
        self._view = view
        self._timing = timing or WriterTiming()
        self._now = now
        self._entries: dict[JobKey, _Entry] = {}

    def accept(self, key: JobKey, incoming: Incoming) -> None:
        """Takes the newest report of a job; never blocks, never raises."""
        now = self._now()
        self._take(key, now).pending = (incoming, now)

    def accept_stacks(self, key: JobKey, rank: int, where: str) -> bool:
        """Where a rank stands still; False where that is known already. Never blocks, never raises."""
        now = self._now()
        entry = self._take(key, now)
        if entry.stacks.get(rank) == where:
            return False
        entry.stacks[rank] = where
        entry.pending = entry.pending or (None, now)
        return True

    def _take(self, key: JobKey, now: datetime) -> _Entry:
        """The job's entry, with a task that looks at it."""
        self._forget(now)
        entry = self._entries.setdefault(key, _Entry())
        entry.touched = now
        entry.wake.set()
        if entry.task is None or entry.task.done():
            entry.task = asyncio.create_task(self._work(key, entry), name=f"progress {key.namespace}/{key.name}")
        return entry

    async def close(self, seconds: float = 5.0) -> None:
        """Ends the tasks and writes each job's pending report within so many seconds."""
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        late = [self._write(key, entry) for key, entry in self._entries.items() if entry.pending is not None]
        with contextlib.suppress(TimeoutError):  # the trainer says it again to whoever serves next
            await asyncio.wait_for(asyncio.gather(*late, return_exceptions=True), seconds)

    async def _work(self, key: JobKey, entry: _Entry) -> None:
        while entry.pending is not None:
            delay = self._delay(key, entry)
            if delay > 0:
                entry.wake.clear()
                with contextlib.suppress(TimeoutError):  # nothing newer came: it is due now
                    await asyncio.wait_for(entry.wake.wait(), delay)
                continue
            await self._attempt(key, entry)

    def _delay(self, key: JobKey, entry: _Entry) -> float:
        """Seconds until the pending report is due; drops it where another replica wrote a newer one."""
        if entry.pending is None:
            return 0.0
        now = self._now()
        if entry.retry_at is not None:
            rest = (entry.retry_at - now).total_seconds()
            return rest if rest <= self._timing.retry_most else 0.0  # the clock was set back meanwhile
        job = self._known(key)
        before = self._previous(job, entry)
        written_at = progress.parse_time((before or {}).get("lastUpdateTime"))
        after = _next(job, entry, before, entry.pending)
        if before is None or written_at is None:
            return 0.0
        age = (now - written_at).total_seconds()
        if age < -_SKEW:  # the clock was set back meanwhile: nobody waits for it to catch up
            return 0.0
        return self._interval(before, after, None if job is None else job.stall_seconds) - age

    def _interval(self, before: Mapping[str, Any], after: Mapping[str, Any], stall: int | None) -> float:
        hangs = stall is not None and progress.idle_seconds(before) < stall <= progress.idle_seconds(after)
        if hangs or progress.is_urgent(before, after):
            return self._timing.urgent_interval
        return self._timing.min_interval if progress.is_visible(before, after) else self._timing.max_interval

    async def _attempt(self, key: JobKey, entry: _Entry) -> None:
        entry.retry_at = None
        try:
            await self._write(key, entry)
        except Exception as error:  # noqa: BLE001 - whatever the API call raises, the report is kept and tried again
            entry.failures += 1
            pause = min(self._timing.retry_most, self._timing.retry_first * 2 ** (entry.failures - 1))
            entry.retry_at = datetime.fromtimestamp(self._now().timestamp() + pause, UTC)
            text = "progress of %s/%s is not written (%s), next try in %.0f s"
            log.warning(text, key.namespace, key.name, error, pause)
        else:
            entry.failures = 0

    async def _write(self, key: JobKey, entry: _Entry) -> None:
        """Writes the pending report; what comes in meanwhile stays pending. Drops it where the job is gone."""
        if entry.pending is None:
            return
        pending = entry.pending
        try:
            body = await self._apply(key, entry, pending)
        except (ObjectMissing, WriteRefused) as error:
            log.warning("progress of %s/%s is dropped: %s", key.namespace, key.name, error)
            body = None
        entry.written = body or entry.written
        if entry.pending is pending:
            entry.pending = None

    async def _apply(
        self, key: JobKey, entry: _Entry, pending: tuple[Incoming | None, datetime]
    ) -> dict[str, Any] | None:
        """The progress written, or None where there is nothing to write it to. WriteConflict after too many tries."""
        incoming, received = pending
        job = self._known(key)
        for attempt in range(_CONFLICT_TRIES):
            if job is None or job.uid != key.uid:
                return None
            before = self._previous(job, entry)
            if incoming is not None and _is_later(before, received):
                return None
            body = _next(job, entry, before, pending)
            try:
                await self._cluster.apply_progress(key.namespace, key.name, job.resource_version, body)
            except WriteConflict:
                await asyncio.sleep(_CONFLICT_PAUSE * 2**attempt)
                job = await self._cluster.read_job(key.namespace, key.name)
            else:
                return body
        raise WriteConflict(f"still changing after {_CONFLICT_TRIES} tries")

    def _known(self, key: JobKey) -> JobView | None:
        job = self._view.job(key.namespace, key.name)
        return job if job is not None and job.uid == key.uid else None

    def _previous(self, job: JobView | None, entry: _Entry) -> Mapping[str, Any] | None:
        return progress.newer(job.progress if job else None, entry.written)

    def _forget(self, now: datetime) -> None:
        old = [
            key
            for key, entry in self._entries.items()
            if entry.pending is None and (now - entry.touched).total_seconds() > self._timing.forget_after
        ]
        for key in old:
            del self._entries[key]


def _next(
    job: JobView | None, entry: _Entry, before: Mapping[str, Any] | None, pending: tuple[Incoming | None, datetime]
) -> dict[str, Any]:
    """status.progress as it is to be. Stacks are kept as long as they are asked for, whoever wrote them."""
    incoming, received = pending
    body = dict(before or {}) if incoming is None else progress.advance(before, incoming, received)
    if job is None or not job.dump:
        entry.stacks.clear()
        return progress.with_stacks(body)
    return progress.with_stacks(body, progress.stacks_of(before), entry.stacks)


def _is_later(before: Mapping[str, Any] | None, received: datetime) -> bool:
    """Whether another replica has written a report that came in after this one (written times have milliseconds).

    A time far in the future is no other replica's but a clock's that was set back since: it must not silence the job.
    """
    written = progress.parse_time((before or {}).get("lastUpdateTime"))
    return written is not None and 0.001 < (written - received).total_seconds() <= _SKEW
