"""The caller's end of the control socket: one request to a running cluster. Used by the command line and the tests."""

import http.client
import json
import os
import socket
from typing import Any

from devcluster.errors import DevclusterError
from devcluster.state import ClusterSpec


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
            self.sock.connect(f"/proc/self/fd/{directory}/control.sock")
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
