"""The control socket of a running cluster: both ends of it.

`ask` is the caller's, used by the command line and the tests; `serve` the supervisor's. What can be asked for is in
`faults` (a full cluster) and `outage` (any).
"""

import http.client
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from devcluster.errors import DevclusterError
from devcluster.state import ClusterSpec

SOCKET = "control.sock"
Bound = Callable[[dict[str, Any]], Awaitable[Any]]
"""An action with what it acts on: given the caller's values, returns what is answered."""


class Refused(Exception):
    """The action cannot be done: the message says why."""


async def serve(actions: Mapping[str, Bound]) -> web.AppRunner:
    """Listen on the socket in the working folder (the state folder: a full path may be too long for a socket)."""

    async def handle(request: web.Request) -> web.Response:
        action = actions.get(request.match_info["action"])
        if action is None:
            return web.json_response({"error": f"no action {request.match_info['action']!r}"}, status=404)
        try:
            return web.json_response({"result": await action(await request.json())})
        except (Refused, OSError, KeyError) as error:
            return web.json_response({"error": str(error)}, status=409)

    app = web.Application()
    app.router.add_post("/{action}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, SOCKET).start()
    return runner


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, folder: str) -> None:
        super().__init__("localhost", timeout=120)
        self._folder = folder

    def connect(self) -> None:
        # Through /proc: a socket's path is limited to 108 bytes, a state folder's is not.
        directory = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(f"/proc/self/fd/{directory}/{SOCKET}")
        finally:
            os.close(directory)


def ask(spec: ClusterSpec, action: str, **values: Any) -> Any:
    """Ask for an action of `devcluster.faults`; raises DevclusterError with its refusal."""
    connection = _UnixConnection(spec.state)
    try:
        connection.request("POST", f"/{action}", json.dumps(values), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
    except OSError as error:
        raise DevclusterError(f"cluster {spec.name!r} does not answer ({error}); next: `status`") from error
    finally:
        connection.close()
    if "error" in answer:
        raise DevclusterError(f"{action}: {answer['error']}")
    return answer["result"]
