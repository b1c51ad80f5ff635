"""This replica's share in leading, as `app` sees it: won, kept, handed over or lost.

Puts elector, fence and watchdog together, and tells log, probes and metrics who leads.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Protocol

from posttrain_operator.health import Health
from posttrain_operator.leader.election import Election, Terms
from posttrain_operator.leader.elector import Elector, LeaseStore
from posttrain_operator.leader.fence import Fence
from posttrain_operator.leader.watchdog import Watchdog
from posttrain_operator.settings import Timing

log = logging.getLogger(__name__)
DRAIN = 3.0
"""Seconds for the answers to writes that are under way when we stop."""
RELEASE = 2.0


class Gauges(Protocol):
    """The metrics' side."""

    def lease_asked(self, result: str) -> None: ...

    def lease_stands(self, leads: bool, transitions: int) -> None: ...


@dataclass(frozen=True)
class Told:
    """Who is told."""

    health: Health
    metrics: Gauges


class Leadership:
    """One per process. Implements elector.Listener."""

    def __init__(self, identity: str, timing: Timing, store: LeaseStore, told: Told) -> None:
        self.identity, self._told = identity, told
        self.fence = Fence()
        terms = Terms(timing.lease, timing.lease_renew, timing.lease_retry)
        self._elector = Elector(identity, terms, store, self.fence, self)
        self._watchdog = Watchdog(self.fence)
        self._holder: str | None = None
        self._answered = True

    async def keep(self) -> None:
        """Tries to win, and renews. LeaseLost when it has won and lost."""
        self._watchdog.start()
        await self._elector.run()

    async def won(self) -> None:
        """Returns when this replica leads."""
        await self._elector.leading.wait()
        self._told.health.standing_by = False

    async def end_writing(self) -> bool:
        """No write is sent any more; whether all that were under way have had their answers. One that has not may still
        arrive, though it is given up here since."""
        self.fence.shut()
        self._answered = self._answered and await self.fence.emptied(DRAIN)
        return self._answered

    async def hand_over(self, keeper: asyncio.Task[Any]) -> None:
        """Ends all writing, and gives the lease up once every write that was under way has had its answer: so that none
        of ours can come after the first of the next leader's. `keeper` runs `keep`."""
        if not await self.end_writing():
            log.warning("a write has no answer yet: the lease is not given up, the next leader waits for its end")
            return
        if keeper.done():
            return
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        if await self._elector.release(RELEASE):
            self._watchdog.stop()
            log.info("%s holds the lease no more", self.identity)

    def asked(self, result: str) -> None:
        self._told.metrics.lease_asked(result)

    def stands(self, election: Election, leads: bool) -> None:
        holder = election.seen.holder
        if holder != self._holder:
            self._holder = holder
            log.info("%s, this replica is %s", f"{holder} leads" if holder else "nobody leads", self.identity)
        if not self._elector.leading.is_set():
            self._told.health.standing_by = bool(holder)
            self._told.health.detail = f"standing by: {holder or 'nobody'} leads"
        self._told.metrics.lease_stands(leads, election.seen.transitions)
