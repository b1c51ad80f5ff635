"""Several candidates, one lease and a bad network in virtual time: what `test_leader_election` plays with.

The electors are the real ones. Time passes only while everybody waits, so that minutes cost milliseconds. Each
candidate has a clock of its own that runs a little fast or slow; requests are delayed, lost on either way, refused by
a conflict, or carried out long after their sender has given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import selectors
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from posttrain_operator.cluster.errors import AlreadyExists, Conflict, Unavailable
from posttrain_operator.leader.election import Election, Terms
from posttrain_operator.leader.elector import Elector, LeaseLost
from posttrain_operator.leader.fence import Fence
from posttrain_operator.leader.lease import Lease


class _Jumping(selectors.SelectSelector):
    """Waits no real time."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everybody waits for ever"
        self.now += max(timeout, 1e-9)  # never nothing: a wait that rounds to no time at all would be repeated for ever
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def play(scene: Coroutine[Any, Any, Any]) -> Any:
    """Runs a scene to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(scene)


@dataclass
class Server:
    """The lease where it really is; every write is atomic."""

    lease: Lease | None = None
    versions: int = 0

    def create(self, lease: Lease) -> Lease:
        if self.lease is not None:
            raise AlreadyExists(409, "AlreadyExists", "taken")
        return self._put(lease)

    def replace(self, lease: Lease) -> Lease:
        if self.lease is None or self.lease.version != lease.version:
            raise Conflict(409, "Conflict", "changed")
        return self._put(lease)

    def _put(self, lease: Lease) -> Lease:
        self.versions += 1
        self.lease = replace(lease, version=str(self.versions))
        return self.lease


@dataclass
class Weather:
    """What the network does: chances of a loss on the way there and back, of a late execution, and seconds of delay."""

    chance: random.Random
    lost: float = 0.0
    unheard: float = 0.0
    late: float = 0.0
    delay: float = 0.05
    cut: set[str] = field(default_factory=set)
    """Candidates that reach nothing."""


class Store:
    """One candidate's way to the server."""

    def __init__(self, name: str, server: Server, weather: Weather) -> None:
        self._name, self._server, self._weather = name, server, weather
        self._orphans: set[asyncio.Task[Any]] = set()

    async def read(self) -> Lease | None:
        return await self._send(lambda: self._server.lease)

    async def create(self, lease: Lease) -> Lease:
        return await self._send(lambda: self._server.create(lease))

    async def replace(self, lease: Lease) -> Lease:
        return await self._send(lambda: self._server.replace(lease))

    async def _send(self, action: Any) -> Any:
        weather = self._weather
        await asyncio.sleep(weather.chance.uniform(0, weather.delay))
        if self._name in weather.cut or weather.chance.random() < weather.lost:
            return await self._silence()
        if weather.chance.random() < weather.late:
            self._later(action)
            return await self._silence()
        answer = action()
        await asyncio.sleep(weather.chance.uniform(0, weather.delay))
        if self._name in weather.cut or weather.chance.random() < weather.unheard:
            return await self._silence()
        return answer

    async def _silence(self) -> Any:
        """An error at once, or no answer until the sender gives up."""
        if self._weather.chance.random() < 0.3:
            raise Unavailable(0, "Reset", "connection reset")
        await asyncio.sleep(1000)

    def _later(self, action: Any) -> None:
        """The request hangs in a buffer and is carried out when nobody waits for it any more."""

        async def arrive() -> None:
            await asyncio.sleep(self._weather.chance.uniform(0, 40))
            with contextlib.suppress(Conflict, AlreadyExists):  # its sender hears of nothing
                action()

        task = asyncio.create_task(arrive())
        self._orphans.add(task)
        task.add_done_callback(self._orphans.discard)


class _Recording(Fence):
    """Notes the real times between which its candidate believes to lead."""

    def __init__(self, offset: float, rate: float) -> None:
        self._offset, self._rate = offset, rate
        super().__init__(lambda: offset + rate * _real())
        self.beliefs: list[tuple[float, float]] = []

    def allow(self, until: float) -> None:
        super().allow(until)
        end = (until - self._offset) / self._rate
        if end > _real():
            self.beliefs.append((_real(), end))

    def shut(self) -> None:
        super().shut()
        self.beliefs = [(start, min(end, _real())) for start, end in self.beliefs]


class _Listener:
    def __init__(self) -> None:
        self.results: list[str] = []

    def asked(self, result: str) -> None:
        self.results.append(result)

    def stands(self, election: Election, leads: bool) -> None:
        """Nothing to note."""


def _real() -> float:
    return asyncio.get_running_loop().time()


class Candidate:
    """One replica: its elector, and what may happen to it."""

    def __init__(self, name: str, server: Server, weather: Weather, clock: tuple[float, float] = (0.0, 1.0)) -> None:
        self.name = name
        self.fence = _Recording(*clock)
        self.listener = _Listener()
        self.elector = Elector(name, Terms(), Store(name, server, weather), self.fence, self.listener)
        self.ended = ""
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self.elector.run()
        except LeaseLost as error:
            self.ended = str(error)

    @property
    def leads(self) -> bool:
        return self.elector.leading.is_set() and self.fence.overdue() < 0 and not self._task.done()

    async def over(self) -> None:
        """Returns when it has lost the lease."""
        await self._task

    async def kill(self) -> None:
        """As by SIGKILL: from one moment to the next, nothing is given up."""
        self.fence.shut()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def stop(self, seconds: float = 3) -> bool:
        """As at SIGTERM."""
        await self.kill()
        return await self.elector.release(seconds)


def overlaps(candidates: list[Candidate]) -> list[str]:
    """The moments at which two believed to lead."""
    spans = sorted((start, end, each.name) for each in candidates for start, end in each.fence.beliefs)
    return [
        f"{name} until {end:.2f}, {other} from {start:.2f}"
        for (_, end, name), (start, _, other) in pairwise(_merged(spans))
        if start < end and name != other
    ]


def _merged(spans: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Spans of one candidate that touch are one."""
    merged: list[tuple[float, float, str]] = []
    for start, end, name in spans:
        if merged and merged[-1][2] == name:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]), name)
        else:
            merged.append((start, end, name))
    return merged
