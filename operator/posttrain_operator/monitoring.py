"""What the operator tells about itself: the metrics' side of the worker and the API client, and the HTTP endpoints.

Made by `app`. It only passes on: numbers are kept by `metrics`, endpoints served by `endpoints`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from posttrain_operator.actions import Actions
from posttrain_operator.brake import Brake
from posttrain_operator.cache import Cache
from posttrain_operator.endpoints import start_http
from posttrain_operator.facts import JobFacts
from posttrain_operator.health import Health
from posttrain_operator.metrics import OperatorMetrics
from posttrain_operator.records import JobRecord, Key
from posttrain_operator.settings import Settings
from posttrain_operator.workqueue import WorkQueue


class Monitoring:
    """Implements worker.Watcher and the API client's observer."""

    def __init__(self) -> None:
        self._cache: Cache | None = None
        self.metrics = OperatorMetrics(self._jobs)
        self.reconciled = self.metrics.reconciled
        self.api_request = self.metrics.api_request
        self.reported = self.metrics.status_report
        self.diverged = self.metrics.diverged
        self.loop_lag = self.metrics.loop_lag

    def transitioned(self, job: JobFacts, actions: Actions) -> None:
        """After each status write; `job` is as it was before."""
        self.metrics.transitioned(job, actions)

    def follow(self, cache: Cache, queue: WorkQueue[Key], brake: Brake) -> None:
        """Once: the cache that the series of jobs are read from, and what else is asked at each scrape."""
        self._cache = cache
        loop = asyncio.get_running_loop()
        self.metrics.loop_tasks(lambda: len(asyncio.all_tasks(loop)))
        self.metrics.follow(lambda: len(queue), queue.waited, lambda: brake.rest)

    async def serve(self, settings: Settings, health: Health) -> Callable[[], Awaitable[None]]:
        """Starts the endpoints where a port is set; returns what stops them. OSError where the port is taken."""
        if settings.metrics_port is None:
            return _nothing
        server = await start_http(settings.metrics_port, self.metrics.registry, health)
        return server.close

    def _jobs(self) -> Iterable[JobRecord]:
        return self._cache.jobs.values() if self._cache is not None else ()


async def _nothing() -> None:
    """There is nothing to stop."""
