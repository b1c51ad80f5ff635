"""Our requests go straight to the API server, whatever proxies the environment names."""

from __future__ import annotations

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration

from posttrain_operator.cluster.api import Api
from posttrain_operator.cluster.connection import Connection


async def test_the_environments_proxies_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"kind": "Namespace"})

    app = web.Application()
    app.router.add_get("/api/v1/namespaces/a", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    configuration: Configuration = type.__call__(Configuration)
    configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    connection = Connection(configuration)
    try:
        assert await Api(connection).request("GET", "/api/v1/namespaces/a") == {"kind": "Namespace"}
    finally:
        await connection.close()
        await runner.cleanup()
