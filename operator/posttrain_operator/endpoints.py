"""/metrics, /livez and /readyz over plain HTTP.

Started by `app` before the watches, so that a probe gets a true answer from the first second. It asks nothing of the
cluster: everything is answered from memory. Only a NetworkPolicy keeps strangers away; what is served here names
jobs but holds no secret.
"""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from posttrain_operator.health import Health


class HttpServer:
    """A running server."""

    def __init__(self, runner: web.AppRunner) -> None:
        self._runner = runner

    @property
    def port(self) -> int:
        """The port it listens on (of use where 0 was asked for)."""
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        """Stops listening."""
        await self._runner.cleanup()


async def start_http(port: int, registry: CollectorRegistry, health: Health, host: str | None = None) -> HttpServer:
    """Listens on `port` (0: any free one) of every address, or of `host`. OSError where it cannot."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def livez(_: web.Request) -> web.Response:
        text = "ok\n" if health.alive else "the work queue has not moved for a while\n"
        return web.Response(text=text, status=200 if health.alive else 503)

    async def readyz(_: web.Request) -> web.Response:
        text = "ok\n" if health.ready else f"not ready: {health.detail}\n"
        return web.Response(text=text, status=200 if health.ready else 503)

    app = web.Application()
    app.add_routes([web.get("/metrics", metrics), web.get("/livez", livez), web.get("/readyz", readyz)])
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except BaseException:
        await runner.cleanup()
        raise
    return HttpServer(runner)
