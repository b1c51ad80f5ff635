"""Times as Kubernetes writes them: RFC 3339 in UTC. Pure helpers; the moment itself is always an argument."""

from __future__ import annotations

from datetime import UTC, datetime


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
