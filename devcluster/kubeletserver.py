"""The node's HTTPS server: logs and exec, for the API server alone.

kubectl asks the API server, which asks here with its own client certificate; the certificate's name is checked, since
the same authority also signs nodes' and administrators' certificates. Exec speaks the WebSocket protocol only (the
node declares that feature, so nobody needs SPDY). Logs are plain files without timestamps: `--timestamps` and `--since`
are refused rather than guessed.
"""

import asyncio
import ssl
from collections import deque
from pathlib import Path
from typing import Any

from aiohttp import web

from devcluster.certificates import KeyPair
from devcluster.containerloop import ContainerLoop
from devcluster.controlplane import KUBELET_CLIENT
from devcluster.execstream import run_exec
from devcluster.node import KUBELET_PORT, Node

POLL = 0.1
UNSUPPORTED = ("timestamps", "sinceSeconds", "sinceTime")


def _text(status: int, message: str) -> web.Response:
    return web.Response(status=status, text=message + "\n")


@web.middleware
async def only_api_server(request: web.Request, handler: Any) -> web.StreamResponse:
    """Refuse every caller but the API server."""
    certificate = request.transport.get_extra_info("peercert") if request.transport else None
    names = {value for part in (certificate or {}).get("subject", ()) for key, value in part if key == "commonName"}
    if KUBELET_CLIENT not in names:
        return _text(403, f"only {KUBELET_CLIENT} may ask, not {sorted(names)}")
    response: web.StreamResponse = await handler(request)
    return response


class KubeletServer:
    """The server of one node."""

    def __init__(self, node: Node, pair: KeyPair, ca: Path) -> None:
        self._node = node
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(pair.cert, pair.key)
        self._tls.load_verify_locations(ca)
        self._tls.verify_mode = ssl.CERT_REQUIRED
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen on the node's address."""
        app = web.Application(middlewares=[only_api_server])
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._logs)
        app.router.add_route("*", "/exec/{namespace}/{pod}/{container}", self._exec)
        app.router.add_get("/healthz", self._health)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._node.ip, KUBELET_PORT, ssl_context=self._tls).start()

    async def stop(self) -> None:
        """Close the port."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, _request: web.Request) -> web.Response:
        return _text(200, "ok")

    def _loop(self, request: web.Request) -> ContainerLoop:
        part = request.match_info
        worker = self._node.find(part["namespace"], part["pod"])
        loop = worker.loop(part["container"]) if worker else None
        if loop is None:
            raise web.HTTPNotFound(text=f"container {part['container']} of {part['namespace']}/{part['pod']} not found")
        return loop

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        for name in UNSUPPORTED:
            if query.get(name) not in (None, "", "false"):
                return _text(400, f"devcluster keeps no times of log lines: {name} is not supported")
        loop = self._loop(request)
        previous = query.get("previous") == "true"
        path = loop.log_of(previous)
        if not path.exists():
            why = loop.state.waiting[0] if loop.state.waiting else "no log yet"
            return _text(400, f"container {loop.spec['name']!r} is waiting to start or has no such log: {why}")
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        follow = query.get("follow") == "true" and not previous
        await _copy(path, response, query, lambda: follow and loop.container is not None and loop.log_path == path)
        return response

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        loop = self._loop(request)
        if loop.container is None:
            return _text(400, f"container {loop.spec['name']} is not running")
        return await run_exec(request, loop.container)


async def _copy(path: Path, response: web.StreamResponse, query: Any, more: Any) -> None:
    """Send the file (or its tail), then what is appended for as long as `more()` holds."""
    limit = int(query["limitBytes"]) if query.get("limitBytes") else None
    with open(path, "rb") as handle:  # noqa: ASYNC230 - a local log file
        if query.get("tailLines"):
            await response.write(b"".join(deque(handle, maxlen=int(query["tailLines"]))))
        while True:
            going_on = more()
            while data := handle.read(1 << 16):
                data = data if limit is None else data[:limit]
                limit = None if limit is None else limit - len(data)
                await response.write(data)
                if limit == 0:
                    return
            if not going_on:
                return
            await asyncio.sleep(POLL)
