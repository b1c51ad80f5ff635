"""A proxy between the operator and the API server that fails in every way that networks and API servers fail.

It runs in a thread of the test process with an event loop of its own and speaks plain HTTP to the operator. The fault
is switched at runtime by `fault`; what a fault means for streams that are open at that moment is in `_strike`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from operator_kit import operator_kubeconfig

from devcluster.testing import Cluster

RETRY_AFTER = 2
"""Seconds that the 429 asks for."""
_PASSED = ("Authorization", "Content-Type", "Accept", "User-Agent")


class Fault(StrEnum):
    """What the operator meets. All but the last three hit every request."""

    NONE = "none"
    REFUSE = "refuse"
    """Nobody listens, open connections are reset."""
    RESET = "reset"
    """Requests are carried out, their answers break off with a reset: the worst for whoever counts on an answer."""
    UNAVAILABLE = "503"
    BUSY = "429"
    """With Retry-After."""
    BLACK_HOLE = "black-hole"
    """Nothing comes back, and what was sent meanwhile is never answered: its connections stay dead for good."""
    CUT = "cut"
    """Watches end in the middle of a line, cleanly or by a reset in turn."""
    GONE = "410"
    """Watches say that their version is too old."""
    BROKEN = "error"
    """Watches say that etcd is in trouble."""
    MUTE = "mute"
    """Watches tell nothing but bookmarks, for ever: they look alive and are dead."""


def status(code: int, reason: str, message: str) -> dict[str, Any]:
    """A Status as the API server writes it."""
    told = {"code": code, "reason": reason, "message": message}
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", **told}


def _error_event(told: dict[str, Any]) -> bytes:
    return json.dumps({"type": "ERROR", "object": told}, separators=(",", ":")).encode() + b"\n"


_ERRORS = {
    Fault.GONE: _error_event(status(410, "Expired", "too old resource version")),
    Fault.BROKEN: _error_event(status(500, "InternalError", "etcdserver: leader changed")),
}
_HALF_A_LINE = b'{"type":"MODIFIED","object":{"metadata":{"name":"half a l'


@dataclass(frozen=True)
class Seen:
    """A request that reached the proxy. `moment`: monotonic seconds."""

    moment: float
    method: str
    path: str
    watch: bool
    fault: Fault


@dataclass
class Held:
    """A write that lies on the wire. `code`: what the API server has answered to it since, 0 until then."""

    method: str
    path: str
    code: int = 0


class _Stream:
    """An open watch."""

    def __init__(self, request: web.Request, response: web.StreamResponse) -> None:
        self.request, self.response = request, response
        self.dead = self.mute = False
        self.over = asyncio.Event()


class Proxy:
    """`url` is the API server as the operator sees it."""

    def __init__(self, server: str, ca: str) -> None:
        self._server, self._trust = server, ssl.create_default_context(cadata=ca)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="api proxy", daemon=True)
        self._mode, self._port, self._cuts = Fault.NONE, 0, 0
        self._streams: set[_Stream] = set()
        self._open = asyncio.Event()
        self._open.set()
        self.seen: list[Seen] = []
        self.held: list[Held] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def fault(self, fault: Fault) -> None:
        """From now on. Fault.NONE ends it."""
        self._run(self._switch(fault))

    def hold(self) -> None:
        """From now on no write arrives, but for the renewals of leases: `held` has them."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def release(self) -> None:
        """All that were held arrive, whatever has become of who sent them."""
        self._loop.call_soon_threadsafe(self._open.set)

    def start(self) -> Proxy:
        self._thread.start()
        self._run(self._start())
        return self

    def stop(self) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _start(self) -> None:
        connector = aiohttp.TCPConnector(ssl=self._trust, limit=0)
        never = aiohttp.ClientTimeout(total=None)
        self._client = aiohttp.ClientSession(connector=connector, timeout=never, read_bufsize=2**22)
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await self._listen()

    async def _listen(self) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await self._site.start()
        self._port = self._port or int(self._runner.addresses[0][1])

    async def _stop(self) -> None:
        for stream in self._streams:
            stream.over.set()
        self._reset_all()
        await self._runner.cleanup()
        await self._client.close()

    async def _switch(self, fault: Fault) -> None:
        before, self._mode = self._mode, fault
        if fault is Fault.REFUSE:
            await self._site.stop()
        elif before is Fault.REFUSE:
            await self._listen()
        for stream in list(self._streams):
            await self._strike(stream)
        if fault in (Fault.REFUSE, Fault.RESET):
            self._reset_all()

    async def _strike(self, stream: _Stream) -> None:
        """What the fault does to a watch that is open."""
        if self._mode is Fault.BLACK_HOLE:
            stream.dead = True
        elif self._mode is Fault.MUTE:
            stream.mute = True
        elif self._mode is not Fault.NONE and not stream.dead:
            await self._end(stream)

    async def _end(self, stream: _Stream) -> None:
        """Ends a watch; the fault says how. Nothing is passed on behind what it says."""
        stream.dead = True
        with contextlib.suppress(ConnectionError, RuntimeError):  # it is gone already
            if error := _ERRORS.get(self._mode):
                await stream.response.write(error)
            if self._mode is Fault.CUT:
                await stream.response.write(_HALF_A_LINE)
                self._cuts += 1
                if self._cuts % 2:
                    _reset(stream.request)
        stream.over.set()

    def _reset_all(self) -> None:
        server = self._runner.server
        for connection in list(server.connections) if server else []:
            if connection.transport is not None:
                _abort(connection.transport)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        fault, watch = self._mode, request.query.get("watch") == "true"
        self.seen.append(Seen(time.monotonic(), request.method, request.path, watch, fault))
        if fault is Fault.BLACK_HOLE:
            await asyncio.Event().wait()
        if fault is Fault.UNAVAILABLE:
            return web.json_response(status(503, "ServiceUnavailable", "the server is starting"), status=503)
        if fault is Fault.BUSY:
            refused = status(429, "TooManyRequests", "too many requests")
            return web.json_response(refused, status=429, headers={"Retry-After": str(RETRY_AFTER)})
        headers = {name: request.headers[name] for name in _PASSED if name in request.headers}
        body = await request.read()
        url = self._server + request.raw_path
        held = await self._delayed(request)
        async with self._client.request(request.method, url, headers=headers, data=body or None) as answer:
            held.code = answer.status
            if watch and answer.status == 200:
                return await self._watch(request, answer)
            return await self._answer(request, answer)

    async def _delayed(self, request: web.Request) -> Held:
        """Returns when the request may arrive."""
        held = Held(request.method, request.path)
        if request.method != "GET" and "/leases" not in request.path and not self._open.is_set():
            self.held.append(held)
            await self._open.wait()
        return held

    async def _answer(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        body = await answer.read()
        headers = {name: answer.headers[name] for name in ("Content-Type", "Retry-After") if name in answer.headers}
        if self._mode is Fault.BLACK_HOLE:
            await asyncio.Event().wait()
        if self._mode is not Fault.RESET:
            return web.Response(status=answer.status, body=body, headers=headers)
        response = web.StreamResponse(status=answer.status, headers={**headers, "Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        _reset(request)
        return response

    async def _watch(self, request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        stream = _Stream(request, response)
        self._streams.add(stream)
        passing = asyncio.create_task(self._pass_on(stream, answer))
        over = asyncio.create_task(stream.over.wait())
        try:
            if self._mode in (*_ERRORS, Fault.RESET, Fault.CUT, Fault.MUTE):
                await self._strike(stream)
                if self._mode is Fault.RESET:
                    _reset(request)
            await asyncio.wait([passing, over], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._streams.discard(stream)
            for task in (passing, over):
                task.cancel()
            await asyncio.gather(passing, over, return_exceptions=True)
        return response

    async def _pass_on(self, stream: _Stream, answer: aiohttp.ClientResponse) -> None:
        rest = b""
        async for data in answer.content.iter_any():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                bookmark = line.startswith(b'{"type":"BOOKMARK"')
                if not stream.dead and (bookmark or not stream.mute):
                    await stream.response.write(line + b"\n")
        if stream.dead:
            await asyncio.Event().wait()


def _reset(request: web.Request) -> None:
    if request.transport is not None:
        _abort(request.transport)


def _abort(transport: asyncio.BaseTransport) -> None:
    """Closes with RST, as a host that has lost its memory answers."""
    raw = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):  # closed already
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert isinstance(transport, asyncio.Transport)
    transport.abort()


@contextlib.contextmanager
def proxy_of(cluster: Cluster) -> Iterator[Proxy]:
    """A proxy of the cluster's API server."""
    admin = json.loads(cluster.kubectl("config", "view", "--raw", "-o", "json"))["clusters"][0]["cluster"]
    running = Proxy(admin["server"], base64.b64decode(admin["certificate-authority-data"]).decode()).start()
    try:
        yield running
    finally:
        running.stop()


def kubeconfig_through(proxy: Proxy, cluster: Cluster, folder: Path) -> Path:
    """The operator's own kubeconfig, with the proxy for the API server."""
    path = operator_kubeconfig(cluster, folder)
    config = json.loads(path.read_text())
    config["clusters"][0]["cluster"] = {"server": proxy.url}
    path.write_text(json.dumps(config))
    return path
