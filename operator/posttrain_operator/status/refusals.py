"""A checkpoint that could not be used while the job goes on from an older one: somebody should look at that storage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_api.reasons import Reason
from posttrain_operator.actions import Event


def refusal_warning(old: Mapping[str, Any], new: Mapping[str, Any]) -> Event | None:
    """The event where an attempt has fallen back to an older checkpoint: once for each fall."""
    before, now = (((status.get("checkpoints") or {}).get("last") or {}) for status in (old, new))
    if not now.get("refused") or now == before:
        return None
    message = f"training goes on from step {now.get('step')}: a newer checkpoint is damaged ({now['refused']})"
    return Event("Warning", Reason.CHECKPOINT_REFUSED, message[:1024])
