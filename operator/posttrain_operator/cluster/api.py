"""The verbs of the Kubernetes API over plain JSON, and nothing else.

Called by `cluster.Cluster` only. Every request has a timeout; an answer that is not 2xx, no answer, and an answer that
breaks off become a typed ApiError. Every write passes the gates (`writes`). Plain JSON instead of the client library's
models, because these cost five times the CPU per request.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp

from posttrain_operator.cluster.connection import Connection
from posttrain_operator.cluster.errors import Unavailable, error_of
from posttrain_operator.cluster.writes import Gate, write_of

log = logging.getLogger(__name__)
JSON = "application/json"
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml; charset=utf-8"
"""With the parameter the client library sends bytes as they are; without it, it would write JSON of its own."""
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
REQUEST_SECONDS = 15.0

Observer = Callable[[str, int, float], None]
"""Told after each request: its verb, the HTTP code (0: none), the seconds it took."""


def resource_path(api_version: str, plural: str, namespace: str | None = None, name: str | None = None) -> str:
    """`/apis/group/version/namespaces/ns/plural/name`, or below `/api` for the core group."""
    root = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
    scope = f"/namespaces/{quote(namespace)}" if namespace else ""
    return f"{root}{scope}/{plural}" + (f"/{quote(name)}" if name else "")


_NOT_YAML = re.compile("[\x7f-\x9f\ufeff\ufffe\uffff]")
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")


def yaml_json(body: Any) -> bytes:
    """JSON that is YAML too, as server-side apply reads it: no surrogate escapes, nothing that YAML calls unprintable.

    A log tail may hold any character; a body that cannot be read would keep the whole status from being written.
    """
    text = _LONE_SURROGATES.sub("\ufffd", json.dumps(body, ensure_ascii=False))
    return _NOT_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode()


class Api:
    """One request at a time each, many at once together."""

    def __init__(
        self, connection: Connection, observer: Observer | None = None, seconds: float = REQUEST_SECONDS
    ) -> None:
        """`seconds`: how long an answer may take, the connection a third of it."""
        self._connection = connection
        self.observers = [observer] if observer else []
        self.gates: list[Gate] = []
        self._timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=seconds / 3)

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Sends and returns the parsed answer. ApiError on refusal, Unavailable where no whole answer came."""
        if method == "GET" or not self.gates:
            return await self._ask(method, path, body, query, headers)
        write = write_of(method, path, body, query)
        for gate in self.gates:
            gate.before(write)
        try:
            return await self._ask(method, path, body, query, headers)
        finally:
            for gate in self.gates:
                gate.after(write)

    async def _ask(
        self, method: str, path: str, body: Any, query: Mapping[str, str] | None, headers: Mapping[str, str] | None
    ) -> dict[str, Any]:
        url = self._connection.server + path + (f"?{urlencode(query)}" if query else "")
        started = time.monotonic()
        status = 0
        try:
            status, raw, retry_after = await self._send(method, url, body, headers or {})
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(0, type(error).__name__, f"{method} {path}: {error}") from error
        finally:
            self._observed(method, path, status, time.monotonic() - started)
        if status >= 400:
            raise error_of(status, raw, retry_after)
        return _parsed(raw, f"{method} {path}")

    def _observed(self, method: str, path: str, status: int, seconds: float) -> None:
        log.debug("%s %s: %d in %.1f ms", method, path, status, seconds * 1000)
        for observer in self.observers:
            observer(method, status, seconds)

    async def _send(
        self, method: str, url: str, body: Any, headers: Mapping[str, str]
    ) -> tuple[int, bytes, str | None]:
        if headers.get("Content-Type") == APPLY_PATCH:
            body = yaml_json(body)
        own = {"User-Agent": self._connection.agent, **await self._connection.headers()}
        sent = {"Accept": JSON, "Content-Type": JSON, **headers, **own}
        response = await self._connection.client.call_api(method, url, sent, body, _request_timeout=self._timeout)
        raw = await response.read()
        return response.status, raw, response.getheader("Retry-After")


def _parsed(raw: bytes, what: str) -> dict[str, Any]:
    """The answer's JSON object. Unavailable for anything else: something between us and the API server speaks."""
    try:
        parsed = json.loads(raw)
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise Unavailable(0, "NotJson", f"{what}: the answer is no JSON object: {raw[:100].decode(errors='replace')}")
    return parsed
