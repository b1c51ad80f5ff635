"""Puts the operator together and runs it until it is told to stop, or until any part of it ends.

Called by `__main__`. Every replica has the status server, the probes and the metrics; the one that holds the lease
watches and works besides. The order matters: our own tasks exist before kopf starts, because kopf cancels whatever was
started after it; workers start when all initial lists have been delivered, because a decision on half a picture is
wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from posttrain_operator.brake import Brake
from posttrain_operator.cache import Cache
from posttrain_operator.cluster import Cluster
from posttrain_operator.cluster.api import Api
from posttrain_operator.cluster.connection import Connection, connect
from posttrain_operator.cluster.errors import ApiError
from posttrain_operator.cluster.failpoints import Failpoints
from posttrain_operator.cluster.kinds import CHILDREN, JOB, WATCHED, Kind
from posttrain_operator.cluster.streams import Pace
from posttrain_operator.execute import Executor
from posttrain_operator.findings import Findings
from posttrain_operator.health import Health
from posttrain_operator.leader.elector import LeaseLost
from posttrain_operator.leader.leadership import Leadership, Told
from posttrain_operator.leader.store import ApiLeaseStore
from posttrain_operator.leader.watchdog import EXIT_LOST
from posttrain_operator.looplag import measure_lag
from posttrain_operator.monitoring import Monitoring
from posttrain_operator.observe import Observer
from posttrain_operator.recorder import Recorder
from posttrain_operator.records import Key
from posttrain_operator.resync import Lists, compare_forever, discover_forever, present, resync_forever
from posttrain_operator.settings import Settings
from posttrain_operator.standby import ReplicaView
from posttrain_operator.statusserver import StatusServer, start_status_server
from posttrain_operator.watch import BackendsChanged, Handlers, Login, Streams, registry_of, watch
from posttrain_operator.worker import Worker, look_for_hangs
from posttrain_operator.workqueue import Backoff, WorkQueue

log = logging.getLogger(__name__)
T = TypeVar("T")
EXIT_STOPPED, EXIT_BROKEN, EXIT_CHANGED = 0, 1, 3
_CODES: dict[type[Exception], int] = {BackendsChanged: EXIT_CHANGED, LeaseLost: EXIT_LOST}
_BEAT = 1.0
_LEAST_REQUEST = 5.0
"""Seconds that a request may take however fast the tests' time runs: a busy API server needs them."""


@dataclass(frozen=True)
class Connections:
    """`lease`: one of its own, so that a control loop with much to do cannot hold a renewal up."""

    work: Connection
    lease: Connection


class Parts:
    """Everything that lives as long as the process. `cluster` writes while this replica leads, `reports` always."""

    def __init__(self, settings: Settings, connections: Connections) -> None:
        timing, connection = settings.timing, connections.work
        self.settings = settings
        self.monitoring = Monitoring()
        self.cache, self.health = Cache(), Health()
        self.leadership = self._leadership(settings, connections)
        self.cluster = Cluster(_api(settings, connection, self.monitoring))
        self.cluster.api.gates.insert(0, self.leadership.fence)
        self.reports = Cluster(_api(settings, connection, self.monitoring))
        self.findings = Findings(timing.lookup, time.monotonic)
        self.queue: WorkQueue[Key] = WorkQueue(Backoff(timing.backoff, timing.backoff_limit))
        self.streams = Streams(Pace(timing.brake, timing.brake_limit))
        self.login = Login(connection, self.streams)
        self.status_server: StatusServer | None = None
        self.observer = Observer(self.cluster, self.cache, self.findings, settings, self.bundle)
        executor = Executor(self.cluster, self.cache, self.findings, Recorder(self.cluster))
        self.worker = Worker(self.queue, self.cache, self.observer, executor, self.monitoring)
        self.worker.brake = Brake(timing.brake, timing.brake_limit)
        self.cluster.api.observers.append(self.worker.brake.heard)
        self.monitoring.follow(self.cache, self.queue, self.worker.brake)

    def _leadership(self, settings: Settings, connections: Connections) -> Leadership:
        identity = f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
        for each in (connections.work, connections.lease):
            each.agent = f"posttrain-operator ({identity})"
        api = Api(connections.lease, self.monitoring.api_request, settings.timing.lease_renew / 2)
        store = ApiLeaseStore(api, settings.namespace, settings.lease)
        return Leadership(identity, settings.timing, store, Told(self.health, self.monitoring.metrics))

    def bundle(self) -> str | None:
        """The status server's CA bundle; None while it does not serve."""
        return self.status_server.ca_bundle() if self.status_server else None


def _api(settings: Settings, connection: Connection, monitoring: Monitoring) -> Api:
    """The door to the API server, and what stands in it."""
    api = Api(connection, monitoring.api_request, max(_LEAST_REQUEST, settings.timing.request))
    if settings.failpoint:
        api.gates.append(Failpoints(settings.failpoint))
    return api


async def run(settings: Settings) -> int:
    """Runs the operator; returns the process's exit code: 0 after SIGTERM, else something that makes the kubelet
    start it again."""
    stop = asyncio.Event()
    _stop_on_signals(stop)
    async with _opened(settings) as parts:
        tasks = [asyncio.create_task(coroutine, name=name) for name, coroutine in _background(parts).items()]
        lease = asyncio.create_task(parts.leadership.keep(), name="lease")
        main = asyncio.create_task(_serve(parts, lambda: _stop_on_signals(stop)), name="operator")
        stopped = asyncio.create_task(stop.wait(), name="stop")
        await asyncio.wait([main, stopped, lease, *tasks], return_when=asyncio.FIRST_COMPLETED)
        parts.health.stopping = True
        await parts.leadership.hand_over(lease)
        await _end([main, stopped, lease, *tasks])
        return _exit_code([main, lease, *tasks])


def _stop_on_signals(stop: asyncio.Event) -> None:
    """Ours come first: the lease is given up before kopf is ended, which takes its time."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[Parts]:
    async with contextlib.AsyncExitStack() as stack:
        connections = Connections(await connect(), await connect())
        stack.push_async_callback(connections.work.close)
        stack.push_async_callback(connections.lease.close)
        parts = Parts(settings, connections)
        stack.push_async_callback(parts.login.close)
        stack.push_async_callback(await parts.monitoring.serve(settings, parts.health))
        yield parts
        if parts.status_server:
            await parts.status_server.close()


def _background(parts: Parts) -> dict[str, Coroutine[Any, Any, None]]:
    """What runs beside the watches from the first moment."""
    return {
        "heartbeat": _beat(parts.health),
        "loop lag": measure_lag(parts.monitoring.loop_lag),
        "status server": _keep_status_server(parts),
        "sweeper": _sweep(parts),
    }


async def _beat(health: Health) -> None:
    while True:
        health.beat()
        await asyncio.sleep(_BEAT)


async def _sweep(parts: Parts) -> None:
    while True:
        parts.findings.sweep()
        await asyncio.sleep(10 * _BEAT)


async def _keep_status_server(parts: Parts) -> None:
    """Starts it, again and again where it cannot start: training goes on without reports."""
    settings = parts.settings
    while settings.status_port is not None and settings.status_url and parts.status_server is None:
        try:
            view = ReplicaView(parts.reports, parts.cache, lambda: parts.health.lists_delivered)
            parts.status_server = await start_status_server(settings, parts.reports, view, parts.monitoring.reported)
        except Exception as error:  # noqa: BLE001  whatever it is, the control loop does not depend on it
            log.error("the status server did not start, again in 10 s: %s", error)
            await asyncio.sleep(10)
    await asyncio.Event().wait()


async def _serve(parts: Parts, started: Callable[[], None]) -> None:
    """Waits until this replica leads, then watches and works until cancelled. Raises where any part of it ends by
    itself. `started` is called when kopf runs."""
    await parts.leadership.won()
    children = await _discover(parts)
    parts.observer.available = frozenset(kind.kind for kind in children)
    kinds = tuple(kind for kind in WATCHED if kind in children or kind not in CHILDREN)
    lists = Lists(parts.cluster, parts.cache, parts.streams, kinds, parts.settings.watch_namespaces)
    registry = registry_of(Handlers(parts.cache, parts.queue.add), parts.login, kinds)
    # All of them before kopf: when it ends it waits five seconds for tasks that were started after it.
    ours = _workforce(parts, lists, children)
    parts.health.detail = "waiting for the initial lists"
    watching = asyncio.create_task(watch(parts.settings, registry, started), name="kopf")
    try:
        done, _ = await asyncio.wait([watching, *ours], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        raise RuntimeError(f"{next(iter(done)).get_name()} ended without being told to")
    finally:
        await parts.leadership.end_writing()  # before the workers are cancelled in the middle of a request
        await _end([watching, *ours])


async def _discover(parts: Parts) -> frozenset[Kind]:
    """Waits for our own kind; says which kinds of child are there."""
    while not await _answered(lambda: parts.cluster.has_kind(JOB)):
        parts.health.detail = "waiting for the PostTrainingJob kind; install crds/posttrainingjobs.yaml"
        log.warning(parts.health.detail)
        await asyncio.sleep(parts.settings.timing.discovery_missing)
    return await _answered(lambda: present(parts.cluster))


async def _answered(ask: Callable[[], Awaitable[T]]) -> T:
    while True:
        try:
            return await ask()
        except ApiError as error:
            log.warning("the API server does not answer: %s", error)
            await asyncio.sleep(1)


def _workforce(parts: Parts, lists: Lists, children: frozenset[Kind]) -> list[asyncio.Task[None]]:
    """The workers and the safety nets; they hold still until the picture is complete. Each ends only by an error."""
    timing, complete = parts.settings.timing, asyncio.Event()

    def task(name: str, run: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        return asyncio.create_task(_gated(complete, run), name=name)

    return [
        asyncio.create_task(_open_gate(parts, lists, complete), name="initial lists"),
        *(task(f"worker {number}", parts.worker.run) for number in range(parts.settings.workers)),
        task("resync", lambda: resync_forever(parts.cache, parts.queue, timing)),
        task("comparison", lambda: compare_forever(lists, parts.cache, parts.queue, timing, parts.monitoring.diverged)),
        task("self-check", lambda: look_for_hangs(parts.worker, timing)),
        task("discovery", lambda: discover_forever(parts.cluster, timing, children, parts.observer.missed)),
    ]


async def _gated(gate: asyncio.Event, run: Callable[[], Awaitable[None]]) -> None:
    await gate.wait()
    await run()


async def _open_gate(parts: Parts, lists: Lists, gate: asyncio.Event) -> None:
    started = time.monotonic()
    await _delivered(parts, lists)
    parts.health.lists_delivered, parts.health.detail = True, "ready"
    log.info("ready after %.1f s: %s", time.monotonic() - started, dict(parts.cache.counts()))
    gate.set()
    await asyncio.Event().wait()


async def _delivered(parts: Parts, lists: Lists) -> None:
    while True:
        try:
            return await lists.delivered()
        except ApiError as error:
            log.warning("the initial lists were not compared: %s", error)
            await asyncio.sleep(1)


def _exit_code(ended: list[asyncio.Task[Any]]) -> int:
    """0 where nothing failed; every failure is logged. A task that was cancelled has not failed."""
    code = EXIT_STOPPED
    for task in ended:
        error = None if task.cancelled() else task.exception()
        if error is None:
            continue
        code = max(code, next((number for kind, number in _CODES.items() if _is(error, kind)), EXIT_BROKEN))
        log.critical("%s ended: %s", task.get_name(), error, exc_info=error if code == EXIT_BROKEN else None)
    return code


def _is(error: BaseException, kind: type[Exception]) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_is(inner, kind) for inner in error.exceptions)
    return isinstance(error, kind)


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    """Cancels all and waits for them; what they raised is read by `_exit_code`."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
