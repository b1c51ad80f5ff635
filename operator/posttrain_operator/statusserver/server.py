"""Starts and stops the status server: TLS, routes, the writer behind them, the renewal of certificates.

Called once by the operator's start on every replica. Nothing here may end the operator: training goes on without
reports, so a caller that gets an error from `start` logs it and tries again later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from aiohttp import web

from posttrain_api import names
from posttrain_api.records import MAX_REPORT_BYTES
from posttrain_operator.certificates import server_names
from posttrain_operator.cluster import Cluster
from posttrain_operator.cluster.reviews import TokenIdentity
from posttrain_operator.settings import Settings, Timing
from posttrain_operator.statusserver.access import ClusterAccess
from posttrain_operator.statusserver.auth import Authenticator
from posttrain_operator.statusserver.handlers import Parts, routes
from posttrain_operator.statusserver.keeper import CertificateKeeper, SecretPlace
from posttrain_operator.statusserver.limits import RateLimiter
from posttrain_operator.statusserver.view import Access, JobsView, StatusCluster
from posttrain_operator.statusserver.writer import ProgressWriter, WriterTiming


def _ignore(result: str) -> None:
    """Counts nothing: for tests."""


@dataclass(frozen=True)
class ServerOptions:
    """Where to listen and how patient to be. In seconds; a bucket is (burst, seconds per further request)."""

    place: SecretPlace
    host: str | None = None
    port: int = 10443
    writing: WriterTiming = field(default_factory=WriterTiming)
    review_ttl: float = 10.0
    per_pod: tuple[int, float] = (20, 1.0)
    failures: tuple[int, float] = (30, 2.0)
    count: Callable[[str], None] = _ignore
    """Told the result of each report (metrics)."""


class StatusServer:
    """A running status server."""

    def __init__(self, runner: web.AppRunner, keeper: CertificateKeeper, writer: ProgressWriter) -> None:
        self._runner = runner
        self._keeper = keeper
        self._writer = writer
        self._renewal = asyncio.create_task(keeper.run(), name="status server certificates")

    @property
    def port(self) -> int:
        """The port it listens on (of use where the options said 0)."""
        return int(self._runner.addresses[0][1])

    def ca_bundle(self) -> str:
        """PEM for the job's CA ConfigMap; changes when an authority is added or removed."""
        return self._keeper.bundle()

    async def close(self) -> None:
        """Stops listening, then writes what is pending."""
        self._renewal.cancel()
        await asyncio.gather(self._renewal, return_exceptions=True)
        await self._runner.cleanup()
        await self._writer.close()


async def start_status_server(
    settings: Settings, cluster: Cluster, view: JobsView, count: Callable[[str], None] = _ignore
) -> StatusServer:
    """Starts as the operator's settings say. Raises as `start`; ValueError where they name no Secret or URL."""
    return await start(options_of(settings, count), ClusterAccess(cluster), view)


def options_of(settings: Settings, count: Callable[[str], None] = _ignore) -> ServerOptions:
    """The options that follow from the settings; intervals are scaled as the operator's other time constants are."""
    host = urlsplit(settings.status_url).hostname
    if not host or not settings.status_secret or settings.status_port is None:
        raise ValueError(
            "the status server needs POSTTRAIN_OPERATOR_STATUS_URL (https://service.namespace.svc:port), _STATUS_SECRET"
            f" and _STATUS_PORT; found {settings.status_url!r}, {settings.status_secret!r}, {settings.status_port!r}"
        )
    scale = settings.timing.resync / Timing().resync
    writing = WriterTiming()
    return ServerOptions(
        place=SecretPlace(settings.namespace, settings.status_secret, server_names(host)),
        port=settings.status_port,
        writing=replace(
            writing,
            urgent_interval=writing.urgent_interval * scale,
            min_interval=writing.min_interval * scale,
            max_interval=writing.max_interval * scale,
        ),
        per_pod=(20, min(1.0, scale)),
        count=count,
    )


async def start(options: ServerOptions, access: Access, view: JobsView) -> StatusServer:
    """Loads the certificates and listens. RuntimeError (certificates), OSError (port) or an API error."""
    keeper = CertificateKeeper(access, options.place)
    await keeper.refresh()
    writer = ProgressWriter(access, view, options.writing)
    parts = Parts(
        auth=Authenticator(_reviewer(access), options.review_ttl),
        view=view,
        writer=writer,
        per_pod=RateLimiter(*options.per_pod),
        failures=RateLimiter(*options.failures),
        count=options.count,
    )
    app = web.Application(client_max_size=MAX_REPORT_BYTES)
    app.add_routes(routes(parts))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0, keepalive_timeout=75.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, options.host, options.port, ssl_context=keeper.context).start()
    except BaseException:
        await runner.cleanup()
        raise
    return StatusServer(runner, keeper, writer)


def _reviewer(cluster: StatusCluster) -> Callable[[str], Awaitable[TokenIdentity | None]]:
    """TokenReview with our audience, at most eight under way: a flood of tokens must not crowd out the control loop."""
    gate = asyncio.Semaphore(8)

    async def review(token: str) -> TokenIdentity | None:
        async with gate:
            return await cluster.review_token(token, names.STATUS_AUDIENCE)

    return review
