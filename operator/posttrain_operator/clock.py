"""Times as Kubernetes writes them: RFC 3339 in UTC. Pure helpers; the moment itself is always an argument.

`SteadyClock` is where the moment comes from: the wall clock, because it is compared with written times, but not its
jumps, because a deadline that a moment of a wrong clock has ended cannot be taken back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

log = logging.getLogger(__name__)


class SteadyClock:
    """The wall clock, carried on by the monotonic one over a jump until the jump has lasted `patience` seconds.

    A clock that is set wrong for less time is never seen; one that is set right (or a machine that slept) is believed
    after `patience`. Differences up to `tolerance` seconds are followed at once: that is how clocks are disciplined.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        tolerance: float = 2.0,
        patience: float = 60.0,
    ) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._tolerance, self._patience = tolerance, patience
        self._offset = wall() - monotonic()
        self._jumped: tuple[float, float] | None = None

    def __call__(self) -> datetime:
        """Now, in UTC."""
        tick = self._monotonic()
        offset = self._wall() - tick
        if abs(offset - self._offset) <= self._tolerance:
            self._offset, self._jumped = offset, None
        else:
            self._jump(offset, tick)
        return datetime.fromtimestamp(tick + self._offset, UTC)

    def _jump(self, offset: float, tick: float) -> None:
        """The wall clock tells another time; it is believed once it has told the same one for long enough."""
        if self._jumped is None or abs(offset - self._jumped[0]) > self._tolerance:
            self._jumped = (offset, tick)
            log.warning("the clock has jumped by %.0f s; believed after %.0f s", offset - self._offset, self._patience)
        elif tick - self._jumped[1] >= self._patience:
            self._offset, self._jumped = offset, None


def render(moment: datetime) -> str:
    """`2026-11-24T10:00:00Z`: whole seconds, as metav1.Time."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse(text: str | None) -> datetime | None:
    """A moment in UTC; None for nothing, for what is not RFC 3339, and for what UTC has no year for."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        return None


def seconds_since(text: str | None, now: datetime) -> float | None:
    """Seconds from the moment written to `now`; None where it cannot be read."""
    moment = parse(text)
    return None if moment is None else (now - moment).total_seconds()


def render_duration(seconds: float) -> str:
    """`1h02m03s`, `2m03s` or `3s`."""
    whole = max(0, int(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02}m{rest:02}s"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
