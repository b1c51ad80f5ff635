"""Which rollout engine a job gets. Called by assemble, once."""

from __future__ import annotations

from typing import Any

from posttrain_trainer.engine import Engine
from posttrain_trainer.rollout.base import Rollout
from posttrain_trainer.rollout.continuous import ContinuousBatching
from posttrain_trainer.rollout.generate import Generate
from posttrain_trainer.runtime import Control
from posttrain_trainer.scorer import causal_lm


def rollout_of(name: str, engine: Engine, control: Control) -> Rollout:
    """name: `rollout.engine` of the job. engine: the policy's.

    Auto: ContinuousBatching where attention is by a flash kernel. With any other kernel one forward of it is attention
    of all requests over the caches of all requests, masked: its work grows with the square of their number.
    """
    if name == "ContinuousBatching" or (name == "Auto" and _flash(engine)):
        return ContinuousBatching(engine, control)
    return Generate(engine, control)


def _flash(engine: Engine) -> bool:
    module: Any = engine.module
    return "flash" in causal_lm(module.lm).config._attn_implementation
