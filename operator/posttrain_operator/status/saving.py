"""Whether a stopped pod has time to save: the measured time of a save against the grace period. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_api.reasons import Reason
from posttrain_operator.actions import Event

SAVES = 2
"""A pod may be told to end when a save has just begun: that one is finished first, then the last one is made."""
STAGED = 3
"""The last one goes straight to the storage, and reads there what it has written; a copy from the node does not."""
_WORDS = {SAVES: "twice", STAGED: "three times"}


def grace_warning(old: Mapping[str, Any], new: Mapping[str, Any]) -> Event | None:
    """The event where saves have become too slow for the grace period: once, not for each of them."""
    found = _short(new)
    if found is None or _short(old) is not None:
        return None
    seconds, grace = found
    times = _WORDS[_saves(new)]
    message = (
        f"the last checkpoint took {seconds:.0f} s; a pod that is told to end needs up to {times} that and has "
        f"{grace} s (runPolicy.terminationGracePeriodSeconds). If the pods are stopped, the work since the last "
        "checkpoint may be lost: give the next job more"
    )
    return Event("Warning", Reason.GRACE_PERIOD_TOO_SHORT, message)


def _short(status: Mapping[str, Any]) -> tuple[float, int] | None:
    """Seconds of the last save and of the grace, where the one does not fit into the other."""
    took = ((status.get("checkpoints") or {}).get("last") or {}).get("saveSeconds")
    grace = ((status.get("resolved") or {}).get("runPolicy") or {}).get("terminationGracePeriodSeconds")
    if took is None or grace is None or _saves(status) * took <= grace:
        return None
    return float(took), int(grace)


def _saves(status: Mapping[str, Any]) -> int:
    return STAGED if ((status.get("resolved") or {}).get("checkpoint") or {}).get("staging") else SAVES
