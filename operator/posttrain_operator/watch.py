"""kopf as the watch engine, and nothing more: its events fill the cache and name the job to look at.

The only importer of kopf. Handlers never await and never raise; kopf gets no rights to write and writes nothing: no
finalizer, no annotation, no event. Its end for any reason is the end of the process, because a cache without its
watches is of unknown age.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import aiohttp
import kopf

from posttrain_operator.cache import Cache
from posttrain_operator.cluster.connection import Connection
from posttrain_operator.cluster.kinds import CHILDREN, JOB, POD, SELECTORS, Kind
from posttrain_operator.cluster.streams import Pace, is_watch
from posttrain_operator.records import Key
from posttrain_operator.settings import Settings, Timing
from posttrain_operator.slim import child_record, job_record, pod_record

log = logging.getLogger(__name__)
LOGIN_MINUTES = 30
_NOT_FOUND = 404
Enqueue = Callable[[Key], None]


class BackendsChanged(Exception):
    """A kind that we use came or went: the watches must be set up anew."""


class Handlers:
    """From watch events to the cache and the queue."""

    def __init__(self, cache: Cache, enqueue: Enqueue) -> None:
        self._cache, self._enqueue = cache, enqueue

    async def on_job(self, event: Mapping[str, Any], **_: Any) -> None:
        record = job_record(event["object"])
        if event["type"] == "DELETED":
            self._cache.drop_job(record.key, record.uid)
        else:
            self._cache.put_job(record)
        self._enqueue(record.key)
        for dependent in self._cache.dependents(record.key):
            self._enqueue(dependent)

    async def on_child(self, event: Mapping[str, Any], **_: Any) -> None:
        record = child_record(event["object"])
        if event["type"] == "DELETED":
            self._cache.drop_child(record.key, record.uid)
        else:
            self._cache.put_child(record)
        self._enqueue(record.key)

    async def on_pod(self, event: Mapping[str, Any], **_: Any) -> None:
        record = pod_record(event["object"])
        if record is None:
            return
        if event["type"] == "DELETED":
            self._cache.drop_pod(record)
        else:
            self._cache.put_pod(record)
        self._enqueue(record.job)


class Streams:
    """Which watch streams have been opened: kopf opens one only after its list was read to the end.

    kopf opens a stream that ended at once again; `pace` holds back one that keeps ending. `lives`: by path, which of
    all openings is open now; none while it is opened again.
    """

    def __init__(self, pace: Pace | None = None) -> None:
        self.opened: set[str] = set()
        self.lives: dict[str, int] = {}
        self._openings = itertools.count(1)
        self._pace = pace or Pace()

    def trace(self) -> aiohttp.TraceConfig:
        config = aiohttp.TraceConfig()
        config.on_request_start.append(self._starts)
        config.on_request_end.append(self._ended)
        return config

    async def _starts(
        self, _: aiohttp.ClientSession, __: SimpleNamespace, params: aiohttp.TraceRequestStartParams
    ) -> None:
        self.lives.pop(params.url.path, None)  # also at a list: who lists has no stream
        if is_watch(params.url) and (delay := self._pace.delay(params.url.path)) > 0:
            log.warning("the watch of %s ended early, it is opened again in %.1f s", params.url.path, delay)
            await asyncio.sleep(delay)

    async def _ended(
        self, _: aiohttp.ClientSession, __: SimpleNamespace, params: aiohttp.TraceRequestEndParams
    ) -> None:
        if is_watch(params.url) and params.response.status == 200:
            self._pace.opened(params.url.path)
            self.lives[params.url.path] = next(self._openings)
            self.opened.add(params.url.path)


class Login:
    """kopf's login: a session with the token of the moment. Must be async, or kopf lives on watching nothing."""

    def __init__(self, connection: Connection, streams: Streams) -> None:
        self._connection, self._streams = connection, streams
        self._sessions: list[aiohttp.ClientSession] = []

    async def __call__(self, **_: Any) -> kopf.AiohttpSession:
        session = await self._connection.watch_session([self._streams.trace()])
        self._sessions.append(session)
        # The streams of the last but one login have long been opened anew: the server ends each after ten minutes.
        while len(self._sessions) > 2:
            await self._sessions.pop(0).close()
        return kopf.AiohttpSession(
            server=self._connection.server,
            aiohttp_session=session,
            expiration=datetime.now(UTC) + timedelta(minutes=LOGIN_MINUTES),
        )

    async def close(self) -> None:
        for session in self._sessions:
            await session.close()


class NullDiffBase(kopf.DiffBaseStorage):
    """kopf keeps no memory of objects: without this every event costs a deep copy and a diff."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


class CappedJitter:
    """Endless back-offs for kopf's requests: an API server that is away for an hour must not end the operator."""

    def __init__(self, first: float, factor: float, limit: float) -> None:
        self._first, self._factor, self._limit = first, factor, limit

    def __iter__(self) -> Iterator[float]:
        delay = self._first
        while True:
            yield delay * (0.75 + random.random() / 2)
            delay = min(self._limit, delay * self._factor)


def watch_settings(timing: Timing) -> kopf.OperatorSettings:
    """kopf's settings: read only, small in memory with ten thousand objects, never tired of an absent server."""
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.persistence.diffbase_storage = NullDiffBase()
    settings.persistence.finalizer = f"{JOB.group}/unused"
    settings.watching.chunk_size = 500  # whole lists at once cost hundreds of MB
    settings.watching.server_timeout = 600  # an int: it is sent as it is written
    settings.watching.connect_timeout = timing.request * 2 / 3
    settings.watching.inactivity_timeout = timing.silent_watch
    settings.watching.reconnect_backoff = timing.brake * 2
    settings.queueing.idle_timeout = 0.2  # kopf keeps a task per object for so long after its last event
    settings.networking.request_timeout = timing.request * 4
    settings.networking.connect_timeout = timing.request * 2 / 3
    settings.networking.error_backoffs = CappedJitter(timing.brake, 2, timing.brake_limit)
    settings.networking.enforce_retry_after = True
    settings.execution.max_workers = 2
    settings.process.ultimate_exiting_timeout = 5  # the last resort: see _until_one_ends
    for kind, selector in SELECTORS.items():
        if selector:
            settings.watching.label_selectors[kind.group, kind.version, kind.plural] = selector
    return settings


def registry_of(handlers: Handlers, login: Login, kinds: tuple[Kind, ...]) -> kopf.OperatorRegistry:
    """Handlers for the kinds that the cluster has."""
    registry = kopf.OperatorRegistry()
    kopf.on.login(id="login", registry=registry)(login.__call__)
    by_kind: Mapping[Kind, Any] = {JOB: handlers.on_job, POD: handlers.on_pod}
    for kind in kinds:
        event = kopf.on.event(
            group=kind.group, version=kind.version, plural=kind.plural, id=kind.plural, registry=registry
        )
        event(handlers.on_child if kind in CHILDREN else by_kind[kind])
    return registry


async def watch(settings: Settings, registry: kopf.OperatorRegistry, started: Callable[[], None]) -> None:
    """Runs kopf until it is cancelled or fails; BackendsChanged where a watched kind is gone. `started` is called when
    kopf has put its own signal handlers in place, so that the caller can put its own back."""
    identity: Any = socket.gethostname()  # kopf's own asks for the user's name, and a pod's user may have none
    try:
        others = asyncio.all_tasks()
        tasks = await kopf.spawn_tasks(
            registry=registry,
            settings=watch_settings(settings.timing),
            identity=identity,
            standalone=True,
            clusterwide=not settings.watch_namespaces,
            namespaces=settings.watch_namespaces,
        )
        started()
        await _until_one_ends(tasks, asyncio.create_task(kopf.run_tasks(tasks, ignored=others), name="kopf's tasks"))
    except Exception as error:
        if getattr(error, "status", None) == _NOT_FOUND:  # kopf's error of a list or a watch
            raise BackendsChanged(f"a watched kind is no longer served: {error}") from error
        raise


async def _until_one_ends(tasks: Collection[asyncio.Task[Any]], running: asyncio.Task[None]) -> None:
    """Raises what the first of kopf's root tasks raises, at once. kopf itself would tell only when all watchers have
    ended, and these may wait for ever for a login that nobody gives any more: the lease must not wait for them."""
    try:
        done, _ = await asyncio.wait([running, *tasks], return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        running.cancel()
        await asyncio.wait([running])
        raise
    for task in done:
        task.result()
