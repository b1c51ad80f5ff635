"""One connection of a pod to the operator's status server. Used by the reporter's thread alone.

Token and CA bundle are read again when they change; the pod's HTTP proxies are not used.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit


@dataclass(frozen=True)
class Endpoint:
    """Where to report: the job's own URL, the CA bundle and the projected token (both change while we run)."""

    url: str
    ca_file: Path | None
    token_file: Path | None


@dataclass(frozen=True)
class Message:
    """What is posted. `place`: relative to the job's report URL; empty: that itself."""

    place: str
    body: bytes
    content_type: str = "application/json"


class Refused(Exception):
    """The server's answer was not 200. `retry_after`: its wish in seconds, as sent."""

    def __init__(self, code: int, message: str, retry_after: str | None) -> None:
        super().__init__(f"{code} {message}")
        self.code, self.retry_after = code, retry_after


class Client:
    """One POST at a time over a connection that is kept: a thousand jobs must not cost the operator 200 handshakes a
    second."""

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._url: SplitResult = urlsplit(endpoint.url)
        self._bundle: str | None = None
        self._connection: http.client.HTTPSConnection | None = None

    def post(self, message: Message) -> Mapping[str, Any]:
        """Sends it; the answer. Refused, or OSError or HTTPException where no answer came."""
        headers = {"Content-Type": message.content_type, **self._authorization()}
        kept = self._connection is not None
        try:
            return self._exchange(message, headers)
        except (OSError, http.client.HTTPException):
            self.close()
            if not kept:
                raise
            return self._exchange(message, headers)  # a kept connection may have been closed by the other side long ago

    def close(self) -> None:
        """Drops the connection; the next message opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _exchange(self, message: Message, headers: dict[str, str]) -> Mapping[str, Any]:
        connection = self._connected()
        connection.request("POST", urljoin(self._url.path, message.place), message.body, headers)
        answer = connection.getresponse()
        found = _json(answer.read(65536))
        if answer.will_close:
            self.close()
        if answer.status != 200:
            said = str(found.get("message", ""))[:500]  # empty where a proxy answered
            raise Refused(answer.status, said or answer.reason, answer.headers.get("Retry-After"))
        return found

    def _connected(self) -> http.client.HTTPSConnection:
        ca = self._endpoint.ca_file
        bundle = None if ca is None else ca.read_text()
        if self._connection is None or bundle != self._bundle:
            self.close()
            context = ssl.create_default_context(cadata=bundle)
            host, port = self._url.hostname or "", self._url.port
            self._connection = http.client.HTTPSConnection(host, port, timeout=self._timeout, context=context)
            self._bundle = bundle
        return self._connection

    def _authorization(self) -> dict[str, str]:
        if self._endpoint.token_file is None:
            return {}
        return {"Authorization": f"Bearer {self._endpoint.token_file.read_text().strip()}"}


def _json(body: bytes) -> Mapping[str, Any]:
    """An object, or nothing: only our own server's words mean something."""
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
