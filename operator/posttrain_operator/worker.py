"""The workers: take a key, observe, decide, carry out, and say when the key is due again.

What each error means is decided here. A lost race costs a moment, a failing object its own backoff; only an API
server that does not answer makes everybody wait. A job whose cached version is refused again and again, or is said not
to exist, is read from the API server itself: the watch may be behind, or dead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from posttrain_operator.actions import Actions
from posttrain_operator.brake import Brake
from posttrain_operator.cache import Cache
from posttrain_operator.clock import SteadyClock
from posttrain_operator.cluster.errors import ApiError, BadBody, Conflict, NotFound, Unavailable
from posttrain_operator.execute import Executor
from posttrain_operator.facts import JobFacts
from posttrain_operator.observe import Observer
from posttrain_operator.reconcile.core import reconcile
from posttrain_operator.records import JobRecord, Key
from posttrain_operator.settings import Timing
from posttrain_operator.workqueue import Backoff, WorkQueue

log = logging.getLogger(__name__)
_RACE, _RACE_LIMIT = 0.05, 5.0
"""Seconds after a lost race, doubled each time: the watch brings the newer version meanwhile."""
_DOUBTFUL = 3
"""Races lost in a row after which the watch is no longer believed: the job is read from the API server."""


class Watcher(Protocol):
    """Told of each pass: the metrics."""

    def reconciled(self, seconds: float, error: str | None) -> None: ...

    def transitioned(self, job: JobFacts, actions: Actions) -> None: ...


class Worker:
    """Runs passes; several run at once, never two for one key."""

    def __init__(
        self, queue: WorkQueue[Key], cache: Cache, observer: Observer, executor: Executor, watcher: Watcher
    ) -> None:
        self._queue, self._cache, self._observer, self._executor = queue, cache, observer, executor
        self._watcher = watcher
        self._races: Backoff[Key] = Backoff(_RACE, _RACE_LIMIT)
        self._doubts: set[Key] = set()
        self._begun: dict[Key, float] = {}
        self._now = SteadyClock()
        self.brake = Brake()

    async def run(self) -> None:
        """For ever."""
        while True:
            key = await self._queue.get()
            try:
                await self.brake.wait()
                await self._pass(key)
            finally:
                self._begun.pop(key, None)
                self._queue.done(key)

    def longest(self) -> float:
        """Seconds that the longest pass under way has taken so far."""
        return time.monotonic() - min(self._begun.values(), default=time.monotonic())

    async def _pass(self, key: Key) -> None:
        self._begun[key] = started = time.monotonic()
        error = None
        try:
            worked = await self._look(key)
            self._queue.succeeded(key)
            self._races.succeeded(key)
        except ApiError as problem:
            worked, error = True, type(problem).__name__
            self._refused(key, problem)
        except Exception:  # one strange object must not end the operator
            worked, error = True, "Unexpected"
            log.exception("%s/%s: the pass failed; again in %.0f s", *key, self._queue.retry(key))
        if worked:
            self._watcher.reconciled(time.monotonic() - started, error)

    async def _look(self, key: Key) -> bool:
        """One pass; False where the job is gone and nothing was to be done."""
        if key in self._doubts:
            self._doubts.discard(key)  # first: where this fails, the pass finds the same doubt again
            await self._executor.look_again(key)
        record = self._cache.jobs.get(key)
        if record is None:
            self._observer.forget(key)
            return False
        await self._reconcile(record)
        return True

    async def _reconcile(self, record: JobRecord) -> None:
        job, now = JobFacts.of(record), self._now()
        seen = await self._observer.observe(record, job, now)
        actions = reconcile(job, seen, now)
        done = actions.nothing or await self._executor.execute(record, actions)
        if not done:
            self._queue.add_after(record.key, _RACE)
            return
        if actions.status is not None:
            self._watcher.transitioned(job, actions)
            log.info("%s/%s: %s (%s)", *record.key, actions.status.get("state"), actions.status.get("reason"))
        if actions.requeue_after is not None:
            self._queue.add_after(record.key, actions.requeue_after)

    def _refused(self, key: Key, problem: ApiError) -> None:
        """The table of errors."""
        if isinstance(problem, Conflict):
            self._queue.add_after(key, self._races.failed(key))
            if self._races.failures(key) >= _DOUBTFUL:
                self._doubts.add(key)
        elif isinstance(problem, NotFound):
            # The job or its namespace went away under us; the watch may not have told, or never will.
            log.info("%s/%s: gone meanwhile: %s", *key, problem.message)
            self._doubts.add(key)
            self._queue.retry(key)
        elif isinstance(problem, BadBody):
            log.error(
                "%s/%s: the API server cannot read our own body, trying again cannot help: %s", *key, problem.message
            )
        elif isinstance(problem, Unavailable):
            delay = self.brake.pull(problem.retry_after)
            log.warning("the API server does not answer, all wait about %.1f s: %s", delay, problem)
            self._queue.add(key)
        else:
            log.warning("%s/%s: refused, again in %.0f s: %s", *key, self._queue.retry(key), problem)


class Stuck(Exception):
    """A pass does not end: every request has a deadline, so this is a fault of ours. The process starts anew."""


async def look_for_hangs(worker: Worker, timing: Timing) -> None:
    """Stuck where a pass takes longer than `timing.stuck`: its job would be forgotten, and nobody would see it."""
    while True:
        await asyncio.sleep(timing.stuck / 10)
        if (seconds := worker.longest()) > timing.stuck:
            raise Stuck(f"a pass over one job has taken {seconds:.0f} s")
