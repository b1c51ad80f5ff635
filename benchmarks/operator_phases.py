"""The parts of the operator's benchmark: each does one thing to a running operator and returns its figures.

Called by `operator_bench` in their order for each size. What is counted comes from outside the operator where that is
possible: from the watch, from /proc, from the API server's own metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from benchmarks import operator_objects as objects
from benchmarks.operator_lives import Hands, Life, Template
from benchmarks.operator_process import Metrics, Operator, cpu_seconds, memory, quantile
from benchmarks.operator_report import Figures, bar, note, spread
from benchmarks.operator_world import World
from devcluster.api import MERGE

LAG = "event_loop_lag_seconds"
_QUIET = 2.0


class Meter:
    """CPU seconds, requests and loop lag of one part: read at its begin and at its end."""

    def __init__(self, world: World, operator: Operator) -> None:
        self._world, self._operator = world, operator

    async def __aenter__(self) -> Meter:
        self._before, self._cpu = await self._read()
        self._begun = time.perf_counter()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begun
        after, cpu = await self._read()
        self.cpu = {name: cpu[name] - self._cpu[name] for name in cpu}
        before = self._before.requests()
        self.requests = {verb: count - before.get(verb, 0) for verb, count in after.requests().items()}
        self.lag = quantile(self._before.buckets(LAG), after.buckets(LAG), 0.99)

    async def _read(self) -> tuple[Metrics, dict[str, float]]:
        metrics = await self._operator.metrics(self._world.http)
        pids = {"operator": self._operator.pid, "API server": self._world.pids["kube-apiserver"]}
        return metrics, {name: cpu_seconds(pid) for name, pid in pids.items()}


async def started(world: World, environ: dict[str, str] | None = None) -> tuple[Operator, Figures]:
    """A new operator process, until it is ready and has looked at every job once."""
    before = await world.writes()
    operator = await Operator(world.kubeconfig, world.folder, environ).ready()
    await quiet(world, operator)
    now, most = memory(operator.pid)
    return operator, {
        "start: until ready, s": operator.ready_seconds,
        "start: CPU until quiet, s": cpu_seconds(operator.pid),
        "start: RSS, MiB": now,
        "start: most RSS, MiB": most,
        "start: writes": await world.writes() - before,
    }


async def quiet(world: World, operator: Operator) -> None:
    """Returns when the operator has used next to no CPU for two seconds."""
    while True:
        operator.must_run()
        before = cpu_seconds(operator.pid)
        await asyncio.sleep(_QUIET)
        if cpu_seconds(operator.pid) - before < 0.1 * _QUIET:
            return


async def lives(world: World, operator: Operator, hands: Hands, count: int) -> Figures:
    """Whole lives, one after another, with a short pause between them."""
    found: list[Life] = []
    async with Meter(world, operator) as meter:
        with bar("lives, one at a time", count) as tick:
            for number in range(count):
                found.append(await hands.live(f"{world.unique()}-{number}"))
                tick()
                await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)  # the last one's events are still on their way
    idle = await world.idle_requests(operator)
    calls = {verb: max(0.0, total - idle.get(verb, 0.0) * meter.seconds) for verb, total in meter.requests.items()}
    return {
        **spread("apply → child, ms", [1000 * life.created for life in found]),
        **spread("pod ready → status, ms", [1000 * life.ready for life in found]),
        **spread("pod ended → status, ms", [1000 * life.succeeded for life in found]),
        **{f"API calls of a life: {verb}": total / count for verb, total in sorted(calls.items())},
        "CPU of a life: operator, ms": 1000 * meter.cpu["operator"] / count,
        "CPU of a life: API server, ms": 1000 * meter.cpu["API server"] / count,
        "loop lag in lives, p99 ≤, ms": 1000 * meter.lag,
    }


async def burst(world: World, operator: Operator, hands: Hands, count: int) -> Figures:
    """So many jobs at once, until each has its child and its status; then they are deleted."""
    async with Meter(world, operator) as meter:
        with bar("burst with the operator", count) as tick:
            seconds, latencies = await hands.burst(world.unique(), count, tick)
    await world.clear(hands)
    return {
        "burst: jobs/s": count / seconds,
        **spread("burst: apply → child, ms", [1000 * each for each in latencies]),
        "burst: CPU of a job, operator, ms": 1000 * meter.cpu["operator"] / count,
        "burst: CPU of a job, API server, ms": 1000 * meter.cpu["API server"] / count,
        "loop lag in the burst, p99 ≤, ms": 1000 * meter.lag,
    }


async def bare(world: World, hands: Hands, template: Template, count: int) -> Figures:
    """The same writes by a bare client while no operator runs."""
    before = cpu_seconds(world.pids["kube-apiserver"])
    with bar("burst of a bare client", count) as tick:
        seconds = await hands.bare(world.unique(), count, template, tick)
    spent = cpu_seconds(world.pids["kube-apiserver"]) - before
    await world.clear(hands)
    return {
        "bare client: jobs/s": count / seconds,
        "bare client: CPU of a job, API server, ms": 1000 * spent / count,
    }


async def fleet(world: World, operator: Operator, wanted: int) -> Figures:
    """Applies jobs until so many run, each with two pods that the status runner plays."""
    path, have = objects.JOBS.format(world.fleet), await world.running(operator)
    missing = wanted - have
    if missing <= 0:
        return {}
    limit = asyncio.Semaphore(32)

    async def one(name: str) -> None:
        async with limit:
            await world.client.post(path, objects.job(name, world.fleet))

    async with Meter(world, operator) as meter:
        with bar("jobs of the fleet run", missing) as tick:
            applied = asyncio.gather(*(one(f"{world.unique()}-{number}") for number in range(missing)))
            shown = 0
            while shown < missing or not applied.done():
                operator.must_run()
                await asyncio.sleep(1.0)
                now = await world.running(operator) - have
                tick(now - shown)
                shown = now
            await applied
    return {
        "fleet: CPU of a start, operator, ms": 1000 * meter.cpu["operator"] / missing,
        "loop lag of the fleet's start, p99 ≤, ms": 1000 * meter.lag,
    }


async def archive(world: World, templates: dict[str, Template], count: int) -> None:
    """Jobs of the past and jobs on hold: of ten, nine have finished and keep their child, one is suspended. Written
    while no operator runs."""
    hands, limit = Hands(world.client, world.seen, world.archive), asyncio.Semaphore(32)

    async def one(number: int, name: str) -> None:
        async with limit:
            if number % 10 == 0:
                job = await world.client.post(hands.jobs, objects.job(name, world.archive, suspend=True))
                held = templates["suspended"]
                await hands.say(job, held.of(held.status, world.archive, name, job["metadata"]["uid"]))
            else:
                await hands.write(name, templates["finished"])
                body = objects.child_status(objects.condition("Succeeded"))
                await world.client.patch(f"{hands.children}/{name}/status", body, MERGE)
        tick()

    with bar("finished and suspended jobs", count) as tick:
        await asyncio.gather(*(one(number, f"{world.unique()}-{number}") for number in range(count)))


async def steady(world: World, operator: Operator, jobs: int, seconds: float) -> Figures:
    """All that run report every five seconds."""
    async with _reporting(world, operator, jobs, seconds) as answered:
        with bar("the fleet reports", int(seconds)) as tick:
            async with Meter(world, operator) as meter:
                for _ in range(int(seconds)):
                    await asyncio.sleep(1.0)
                    tick()
        told = await answered()
    latencies = [1000 * each for each in told["seconds"]]
    accepted = told["codes"].get("200", 0)
    return {
        "reports/s": len(latencies) / seconds,
        "reports refused": len(latencies) - accepted,
        **spread("report answered, ms", latencies),
        "steady: CPU, operator, % of a core": 100 * meter.cpu["operator"] / meter.seconds,
        "steady: CPU, API server, % of a core": 100 * meter.cpu["API server"] / meter.seconds,
        "steady: status writes/s": meter.requests.get("PATCH", 0) / meter.seconds,
        "steady: RSS, MiB": memory(operator.pid)[0],
        "loop lag in steady state, p99 ≤, ms": 1000 * meter.lag,
    }


@asynccontextmanager
async def _reporting(
    world: World, operator: Operator, jobs: int, seconds: float
) -> AsyncIterator[Callable[[], Awaitable[dict[str, Any]]]]:
    """The process of the reporters, from its first report on."""
    command = [sys.executable, "-m", "benchmarks.operator_reports", str(world.cluster.spec.root), world.fleet]
    command += [operator.status_url, f"--jobs={jobs}", f"--seconds={seconds}"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, limit=2**26, start_new_session=True)
    assert process.stdout is not None
    stdout = process.stdout

    async def answer() -> dict[str, Any]:
        line = await stdout.readline()
        if not line:
            raise RuntimeError(f"the process of the reporters ended with {await process.wait()}")
        return {} if line == b"begun\n" else dict(json.loads(line))

    try:
        await answer()
        yield answer
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            process.kill()
        await process.wait()


async def no_op(world: World) -> Figures:
    """A whole resync, with all time constants at a twentieth: every unfinished job is looked at, nothing may
    be written.

    Nobody waits for it to be quiet first: at this scale it opens silent watches anew all the time."""
    operator = Operator(world.kubeconfig, world.folder, {"TIME_SCALE": "0.05", "LEASE_SECONDS": "300"})
    try:
        await operator.ready()
        before, spent = await world.writes(), cpu_seconds(operator.pid)
        with bar("a resync of everything", 40) as tick:
            for _ in range(40):
                await asyncio.sleep(1.0)
                tick()
        written = await world.writes() - before
        if written:
            note(f"written in a resync that should write nothing: {await world.last_writes()}")
        return {"no-op resync: writes": written, "no-op resync: CPU, s": cpu_seconds(operator.pid) - spent}
    finally:
        operator.stop()


async def templates(world: World, hands: Hands) -> dict[str, Template]:
    """What the operator writes for a job that starts, that has finished, and that is suspended."""
    return {
        "started": await hands.template(f"starts{world.unique()}"),
        "finished": await hands.template(f"finishes{world.unique()}", finish=True),
        "suspended": await hands.template(f"waits{world.unique()}", suspend=True),
    }
