"""Keeps the lease: asks `election` what to send, sends it, tells it the answer. Runs for the process's whole life.

It has a connection of its own, so that a control loop with much to do cannot hold a renewal up. No request outlives
the moment at which its answer would be of no use.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from posttrain_operator.cluster.errors import AlreadyExists, ApiError, Conflict
from posttrain_operator.leader.election import Election, Terms
from posttrain_operator.leader.fence import Fence
from posttrain_operator.leader.lease import Lease, micro_time

log = logging.getLogger(__name__)


class LeaseLost(Exception):
    """This replica led and does so no more: the process must end."""


class LeaseStore(Protocol):
    """The one Lease. Refusals are the types of cluster.errors."""

    async def read(self) -> Lease | None:
        """The lease; None where there is none."""

    async def create(self, lease: Lease) -> Lease:
        """AlreadyExists where somebody was faster."""

    async def replace(self, lease: Lease) -> Lease:
        """Conflict where it is not at the lease's version any more."""


class Listener(Protocol):
    """Told what happens: log, metrics, readiness."""

    def asked(self, result: str) -> None:
        """A request for the lease ended so: read, written, conflict or failed."""

    def stands(self, election: Election, leads: bool) -> None:
        """After each request."""


class Elector:
    """One candidate. `leading` is set for good once it has won; after that `run` raises when it has lost."""

    def __init__(self, identity: str, terms: Terms, store: LeaseStore, fence: Fence, listener: Listener) -> None:
        self._store, self._fence, self._listener = store, fence, listener
        self._clock = fence.clock
        self._state = Election(identity, terms)
        self.leading = asyncio.Event()

    async def run(self) -> None:
        """For ever. LeaseLost when the renewal came too late, or another holds the lease."""
        while not self._state.lost(self._clock()):
            await self._turn()
            await asyncio.sleep(self._rest(self._state.pause(self._clock()) * random.uniform(0.8, 1.2)))
        self._fence.shut()
        holder = self._state.seen.holder
        why = "it could not be renewed in time" if holder == self._state.identity else f"{holder or 'nobody'} holds it"
        raise LeaseLost(f"the lease is lost: {why}")

    async def release(self, seconds: float) -> bool:
        """Gives the lease up within so many seconds, after `run` was cancelled. True: it is not ours any more."""
        try:
            async with asyncio.timeout(seconds):
                return await self._give_up()
        except (ApiError, TimeoutError) as error:
            log.warning("the lease is not given up, the next leader waits for its end: %r", error)
            return False

    async def _turn(self) -> None:
        """One request, and what follows from its answer."""
        sent_at = self._clock()
        wanted = self._state.wanted(sent_at, _wall())
        try:
            async with asyncio.timeout(self._rest(self._state.terms.renew / 2)):
                if wanted is None:
                    self._state = self._state.observed(await self._store.read(), self._clock())
                else:
                    self._state = self._state.stored(await self._write(wanted), sent_at, self._clock())
            result = "read" if wanted is None else "written"
        except (Conflict, AlreadyExists):
            self._state, result = self._state.unsure(), "conflict"
        except (ApiError, TimeoutError) as error:
            self._state, result = self._state.unsure(), "failed"
            log.warning("the lease was not %s: %r", "read" if wanted is None else "written", error)
        self._tell(result)

    def _tell(self, result: str) -> None:
        leads = self._state.leads(self._clock())
        if self._state.until is not None:
            self._fence.allow(self._state.until)
        if leads:
            self.leading.set()
        self._listener.asked(result)
        self._listener.stands(self._state, leads)

    def _rest(self, seconds: float) -> float:
        """No longer than it still leads, where it does."""
        until = self._state.until
        return seconds if until is None else max(0.0, min(seconds, until - self._clock()))

    async def _write(self, lease: Lease) -> Lease:
        return await (self._store.replace(lease) if lease.version else self._store.create(lease))

    async def _give_up(self) -> bool:
        """A renewal that was cancelled may have been carried out: then the version is another one."""
        while True:
            if not self._state.fresh:
                self._state = self._state.observed(await self._store.read(), self._clock())
            if self._state.seen.holder != self._state.identity or not self._state.seen.version:
                return True
            try:
                given = await self._store.replace(self._state.given_up(_wall()))
            except Conflict:
                self._state = self._state.unsure()
            else:
                self._state = replace(self._state, seen=given)
                return True


def _wall() -> str:
    return micro_time(datetime.now(UTC))
