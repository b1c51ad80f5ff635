"""A small asynchronous Kubernetes client: JSON over TLS with a client certificate, and a list-and-watch loop.

The node, the services and the storage provisioner speak to the API server through it, each under its own identity.
Objects are plain dictionaries here: the node passes through fields that it does not know.
"""

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from devcluster.certificates import KeyPair

Obj = dict[str, Any]
log = logging.getLogger(__name__)
STRATEGIC = "application/strategic-merge-patch+json"
MERGE = "application/merge-patch+json"
APPLY = "application/apply-patch+yaml"


class ApiError(Exception):
    """The API server's answer with a status of 400 or more."""

    def __init__(self, code: int, message: str, reason: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code, self.message, self.reason = code, message, reason


def _api_error(code: int, text: str) -> ApiError:
    try:
        body = json.loads(text)
        return ApiError(code, str(body.get("message", text)), str(body.get("reason", "")))
    except (ValueError, AttributeError):  # not a Status object: pass the text on as it came
        return ApiError(code, text.strip(), "")


class Client:
    """One identity's connection to the API server."""

    def __init__(self, server: str, ca: Path, pair: KeyPair) -> None:
        context = ssl.create_default_context(cafile=str(ca))
        context.load_cert_chain(pair.cert, pair.key)
        self._session = aiohttp.ClientSession(
            base_url=server,
            connector=aiohttp.TCPConnector(ssl=context, limit=64),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        )

    async def close(self) -> None:
        await self._session.close()

    async def request(self, method: str, path: str, body: Any = None, **options: Any) -> Obj:
        """One request; raises ApiError for a refusal. `content_type` and `params` may be given."""
        headers = {"Content-Type": options.pop("content_type", "application/json"), "Accept": "application/json"}
        data = body if body is None or isinstance(body, str) else json.dumps(body)
        timeout = aiohttp.ClientTimeout(total=60)
        async with self._session.request(
            method, path, data=data, headers=headers, timeout=timeout, **options
        ) as answer:
            text = await answer.text()
            if answer.status >= 400:
                raise _api_error(answer.status, text)
            return dict(json.loads(text)) if text.startswith("{") else {"text": text}

    async def get(self, path: str, **params: str) -> Obj:
        return await self.request("GET", path, params=params)

    async def post(self, path: str, body: Obj) -> Obj:
        return await self.request("POST", path, body)

    async def patch(self, path: str, body: Obj | str, content_type: str = STRATEGIC, **params: str) -> Obj:
        return await self.request("PATCH", path, body, content_type=content_type, params=params)

    async def delete(self, path: str, body: Obj | None = None) -> Obj:
        return await self.request("DELETE", path, body)

    async def apply(self, path: str, body: Obj) -> Obj:
        """Server-side apply as field manager `devcluster`."""
        return await self.patch(path, body, APPLY, fieldManager="devcluster", force="true")

    async def apply_text(self, path: str, text: str) -> Obj:
        """Server-side apply of one YAML document as it stands, unparsed."""
        return await self.patch(path, text, APPLY, fieldManager="devcluster", force="true")

    async def stream(self, path: str, params: Mapping[str, str]) -> AsyncIterator[Obj]:
        """Watch events, one dictionary each, until the server ends the stream."""
        query = {**params, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": "300"}
        async with self._session.get(path, params=query) as answer:
            if answer.status >= 400:
                raise _api_error(answer.status, await answer.text())
            buffer = b""
            async for chunk in answer.content.iter_any():
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    yield json.loads(line)


class Informer:
    """Keeps a copy of a collection: `store` by namespace/name. `changed(kind, obj)` hears ADDED, MODIFIED, DELETED."""

    def __init__(
        self, client: Client, path: str, params: Mapping[str, str], changed: Callable[[str, Obj], None]
    ) -> None:
        self._client, self._path, self._params, self._changed = client, path, dict(params), changed
        self.store: dict[str, Obj] = {}
        self.synced = asyncio.Event()

    async def run(self) -> None:
        """List, then watch, for ever; a lost connection or an expired version lists anew."""
        while True:
            try:
                version = await self._list()
                self.synced.set()
                await self._follow(version)
            except (ApiError, aiohttp.ClientError, TimeoutError, ValueError) as error:
                log.info("watch of %s broke off, listing anew: %s", self._path, error)
                await asyncio.sleep(0.5)

    async def _list(self) -> str:
        answer = await self._client.get(self._path, **self._params)
        fresh = {key_of(item): item for item in answer["items"]}
        for key in [key for key in self.store if key not in fresh]:
            self._changed("DELETED", self.store.pop(key))
        for key, item in fresh.items():
            kind = "MODIFIED" if key in self.store else "ADDED"
            self.store[key] = item
            self._changed(kind, item)
        return str(answer["metadata"]["resourceVersion"])

    async def _follow(self, version: str) -> None:
        while True:
            async for event in self._client.stream(self._path, {**self._params, "resourceVersion": version}):
                if event["type"] == "ERROR":
                    raise _api_error(int(event["object"].get("code", 500)), json.dumps(event["object"]))
                version = event["object"]["metadata"]["resourceVersion"]
                self._take(event["type"], event["object"])

    def _take(self, kind: str, obj: Obj) -> None:
        if kind == "BOOKMARK":
            return
        if kind == "DELETED":
            self.store.pop(key_of(obj), None)
        else:
            self.store[key_of(obj)] = obj
        self._changed(kind, obj)


def key_of(obj: Obj) -> str:
    """namespace/name of an object."""
    meta = obj["metadata"]
    return f"{meta.get('namespace', '')}/{meta['name']}"
