"""Which rollout engine a job gets. Called by assemble, once."""

from __future__ import annotations

from typing import Any

from posttrain_trainer.engine import Engine
from posttrain_trainer.rollout.base import Rollout
from posttrain_trainer.rollout.continuous import ContinuousBatching, is_flash
from posttrain_trainer.rollout.generate import Generate
from posttrain_trainer.runtime import Control
from posttrain_trainer.scorer import causal_lm


def rollout_of(name: str, engine: Engine, control: Control) -> Rollout:
    """name: `rollout.engine` of the job. engine: the policy's.

    Auto: ContinuousBatching where attention is by a flash kernel. With any other kernel one forward of it is masked
    attention of all requests over the caches of all requests, whose work grows with the square of their number. On one
    CPU core (64 prompts of 10 to 150 tokens, 2,500 sampled, up to 128 each) Generate took 2.2 s with 1.3 M parameters
    and 8.5 s with 12.5 M, ContinuousBatching 4.0 s and 11.6 s.
    """
    module: Any = engine.module
    if name == "ContinuousBatching" or (name == "Auto" and is_flash(causal_lm(module.lm))):
        return ContinuousBatching(engine, control)
    return Generate(engine, control)
