"""The workers: take a key, observe, decide, carry out, and say when the key is due again.

What each error means is decided here. A lost race costs a moment, a failing object its own backoff; only an API
server that does not answer makes everybody wait.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from datetime import UTC, datetime
from typing import Protocol

from posttrain_operator.actions import Actions
from posttrain_operator.cache import Cache
from posttrain_operator.cluster.errors import ApiError, BadBody, Conflict, NotFound, Unavailable
from posttrain_operator.execute import Executor
from posttrain_operator.facts import JobFacts
from posttrain_operator.observe import Observer
from posttrain_operator.reconcile.core import reconcile
from posttrain_operator.records import JobRecord, Key
from posttrain_operator.workqueue import WorkQueue

log = logging.getLogger(__name__)
_RACE = 0.05
"""Seconds after a lost race: the watch brings the newer version meanwhile."""


class Watcher(Protocol):
    """Told of each pass: the metrics."""

    def reconciled(self, seconds: float, error: str | None) -> None: ...

    def transitioned(self, job: JobFacts, actions: Actions) -> None: ...


class Brake:
    """Holds all workers while the API server asks for rest or does not answer."""

    def __init__(self) -> None:
        self._until = 0.0
        self._failures = 0

    def pull(self, retry_after: float | None) -> float:
        """Everybody waits for what the server asked, or 0.5, 1, 2 … 30 s. Requests that fail together count once."""
        if time.monotonic() >= self._until:
            self._failures += 1
        delay = retry_after if retry_after is not None else min(30.0, 0.25 * 2.0 ** min(self._failures, 10))
        self._until = max(self._until, time.monotonic() + delay * (0.75 + random.random() / 2))
        return delay

    def release(self) -> None:
        self._failures = 0

    async def wait(self) -> None:
        # Until the moment has passed, which may be moved on while we wait.
        while (rest := self._until - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(rest)


class Worker:
    """Runs passes; several run at once, never two for one key."""

    def __init__(
        self, queue: WorkQueue[Key], cache: Cache, observer: Observer, executor: Executor, watcher: Watcher
    ) -> None:
        self._queue, self._cache, self._observer, self._executor = queue, cache, observer, executor
        self._watcher = watcher
        self.brake = Brake()

    async def run(self) -> None:
        """For ever."""
        while True:
            await self.brake.wait()
            key = await self._queue.get()
            try:
                await self._pass(key)
            finally:
                self._queue.done(key)

    async def _pass(self, key: Key) -> None:
        record = self._cache.jobs.get(key)
        if record is None:
            self._observer.forget(key)
            self._queue.succeeded(key)
            return
        started, error = time.monotonic(), None
        try:
            await self._reconcile(record)
            self._queue.succeeded(key)
            self.brake.release()
        except ApiError as problem:
            error = type(problem).__name__
            self._refused(key, problem)
        except Exception:  # one strange object must not end the operator
            error = "Unexpected"
            log.exception("%s/%s: the pass failed; again in %.0f s", *key, self._queue.retry(key))
        self._watcher.reconciled(time.monotonic() - started, error)

    async def _reconcile(self, record: JobRecord) -> None:
        job, now = JobFacts.of(record), datetime.now(UTC)
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
            self._queue.add_after(key, _RACE * (1 + random.random()))
        elif isinstance(problem, NotFound):
            # The job or its namespace went away under us; if it did not, the resync sees it again.
            log.info("%s/%s: gone meanwhile: %s", *key, problem.message)
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
