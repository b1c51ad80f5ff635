"""What the operator tells about itself: the metrics' side of the worker and the API client, and the HTTP endpoints.

Made by `app`. It only passes on: numbers are kept by `metrics`, endpoints served by `http`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from posttrain_operator.actions import Actions
from posttrain_operator.cache import Cache
from posttrain_operator.facts import JobFacts
from posttrain_operator.health import Health
from posttrain_operator.settings import Settings


class Monitoring:
    """Implements worker.Watcher and the API client's observer."""

    def reconciled(self, seconds: float, error: str | None) -> None:
        """After each pass."""

    def transitioned(self, job: JobFacts, actions: Actions) -> None:
        """After each status write; `job` is as it was before."""

    def api_request(self, method: str, status: int, seconds: float) -> None:
        """After each request; status 0 where no answer came."""

    def reported(self, result: str) -> None:
        """After each progress report."""

    def measured(self, cache: Cache, waiting: int) -> None:
        """Every few seconds."""

    async def serve(self, settings: Settings, health: Health) -> Callable[[], Awaitable[None]]:
        """Starts the endpoints; returns what stops them."""

        async def stop() -> None:
            return None

        return stop
