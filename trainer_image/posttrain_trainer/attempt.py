"""The attempt record on storage: which attempt this is, and how long to wait before it.

Node 0's launcher writes it at each start. The number fences what a cut-off predecessor still writes (fence.py). After
an attempt that never trained the operator pauses, with no pods. The pause here is for those that trained and saved
nothing, and for when no operator runs and the controller recreates pods at once: 2ⁿ seconds, n the number of attempts
in a row without a new checkpoint, with jitter; at most 30, because the GPUs idle meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from posttrain_api.base import Model
from posttrain_api.names import ATTEMPT_FILE, CHECKPOINTS_DIR
from posttrain_trainer.checkpoint_files import replace_json
from posttrain_trainer.record import utc_now

ENV_BACKOFF_SCALE = "POSTTRAIN_BACKOFF_SCALE"
"""Factor on every pause; tests shorten it."""
MAX_BACKOFF_SECONDS = 30.0
_MANIFEST = "manifest.json"
_PREFIX = "step-"


class Attempt(Model):
    """`attempt` counts from 1; `checkpoint_step`: the newest checkpoint when it began (-1: none); `fruitless`:
    attempts in a row, before this one, that made no newer checkpoint than they found."""

    attempt: int
    checkpoint_step: int
    fruitless: int
    time: str


def begin(run_dir: Path) -> Attempt:
    """Writes and returns the record of a new attempt, whole or not at all."""
    before = _read(run_dir)
    step = newest_checkpoint(run_dir)
    if before is None:
        now = Attempt(attempt=1, checkpoint_step=step, fruitless=0, time=utc_now())
    else:
        fruitless = 0 if step > before.checkpoint_step else before.fruitless + 1
        now = Attempt(attempt=before.attempt + 1, checkpoint_step=step, fruitless=fruitless, time=utc_now())
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_json(run_dir / ATTEMPT_FILE, now.to_wire())
    return now


def _read(run_dir: Path) -> Attempt | None:
    path = run_dir / ATTEMPT_FILE
    try:
        return Attempt.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except ValidationError:
        # Of another release: only the number is needed, and it must not go back.
        number = json.loads(path.read_text()).get("attempt", 0)
        return Attempt(attempt=int(number), checkpoint_step=-1, fruitless=0, time=utc_now())


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest committed checkpoint, -1 where there is none."""
    folders = (path.parent.name for path in (run_dir / CHECKPOINTS_DIR).glob(f"{_PREFIX}*/{_MANIFEST}"))
    steps = (name.removeprefix(_PREFIX) for name in folders)
    return max((int(step) for step in steps if step.isdecimal()), default=-1)


def backoff_seconds(fruitless: int, chance: float, environment: Mapping[str, str]) -> float:
    """min(2ⁿ, 30) × (0.5 … 1); `chance` in [0, 1) is the jitter. No pause before an attempt that follows progress."""
    if fruitless == 0:
        return 0.0
    scale = float(environment.get(ENV_BACKOFF_SCALE, "1"))
    return min(2.0 ** min(fruitless, 16), MAX_BACKOFF_SECONDS) * (0.5 + chance / 2) * scale
