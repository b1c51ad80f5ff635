"""Who leads, decided on what was seen of the lease and on the local clock alone.

A pure state machine: `elector` asks it for the next request and tells it the answer. That two never believe to lead
at once follows from three rules, as long as clocks run equally fast within a fifth of each other:

- a leader counts from the moment it *sent* the renewal that succeeded, and stops after `renew` seconds;
- others count from the moment they *saw* the lease change, and take it after `duration` (> `renew`) seconds;
- every write carries the version that was seen, so that of two who try one gets a conflict.

No clock is compared with another one, and no answer that comes late makes anybody a leader.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from posttrain_operator.leader.lease import Lease

NOBODY = Lease()


@dataclass(frozen=True)
class Terms:
    """Seconds: a lease not renewed for `duration` may be taken; who could not renew for `renew` stops; `retry` is the
    pause between renewals."""

    duration: float = 15
    renew: float = 10
    retry: float = 2


@dataclass(frozen=True)
class Election:
    """One candidate's view. `seen` is the lease since `seen_at` (local seconds); `fresh`: nothing of ours has failed
    since; `until`: it leads before that moment, None: it has never led."""

    identity: str
    terms: Terms
    seen: Lease = NOBODY
    seen_at: float = 0.0
    fresh: bool = False
    until: float | None = None

    def leads(self, now: float) -> bool:
        return self.until is not None and now < self.until

    def lost(self, now: float) -> bool:
        """It has led and does so no more: for good."""
        return self.until is not None and now >= self.until

    def wanted(self, now: float, wall: str) -> Lease | None:
        """The lease to write next; None: read it first. `wall` is the time that people will read in it."""
        if not self.fresh or not (self.seen.holder == self.identity or self._free(now)):
            return None
        change = self.seen.holder != self.identity
        return replace(
            self.seen,
            holder=self.identity,
            seconds=math.ceil(self.terms.duration),
            transitions=self.seen.transitions + change,
            acquired=wall if change else self.seen.acquired,
            renewed=wall,
        )

    def given_up(self, wall: str) -> Lease:
        """The lease to write when it goes: held by nobody, so that the next one need not wait."""
        return replace(self.seen, holder="", seconds=1, renewed=wall)

    def pause(self, now: float) -> float:
        """Seconds until the next request: a standby looks twice as often as a leader renews, and takes at once what is
        free. A leader whose last renewal was sent longer ago than it rests (it took its time, or failed and the
        lease was read since) sends the next at once."""
        standby = 0.0 if self.fresh and self._free(now) else 0.5
        return self.terms.retry * (self._haste(now) if self.leads(now) else standby)

    def observed(self, lease: Lease | None, now: float) -> Election:
        """The lease was read; None: there is none. One that vanished is waited for as if it were still held."""
        lease = lease or self.seen.says()
        until = self.until
        if until is not None and lease.holder != self.identity:
            until = min(until, now)
        seen_at = self.seen_at if lease.says() == self.seen.says() else now
        return replace(self, seen=lease, seen_at=seen_at, fresh=True, until=until)

    def stored(self, lease: Lease, sent_at: float, now: float) -> Election:
        """Our write, sent at `sent_at`, succeeded. An answer that comes too late makes no leader."""
        if self.lost(now):
            return self
        until = sent_at + self.terms.renew
        return replace(
            self,
            seen=lease,
            seen_at=now,
            fresh=True,
            until=until if until > now or self.until is not None else None,
        )

    def unsure(self) -> Election:
        """A request failed: it may have been carried out all the same."""
        return replace(self, fresh=False)

    def _haste(self, now: float) -> float:
        assert self.until is not None
        if not self.fresh:
            return 0.25
        renewed = self.until - self.terms.renew
        return 0.0 if now >= renewed + self.terms.retry else 1.0

    def _free(self, now: float) -> bool:
        return not self.seen.holder or now >= self.seen_at + self._patience()

    def _patience(self) -> float:
        """Ours, rounded up in the lease; a longer one there is of a holder with other settings."""
        ours = self.terms.duration
        return ours if self.seen.seconds <= math.ceil(ours) else self.seen.seconds
