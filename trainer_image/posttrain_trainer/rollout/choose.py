"""Which rollout engine a job gets. Called by assemble, once."""

from __future__ import annotations

from posttrain_trainer.engine import Engine
from posttrain_trainer.rollout.base import Rollout
from posttrain_trainer.rollout.continuous import ContinuousBatching
from posttrain_trainer.rollout.generate import Generate
from posttrain_trainer.runtime import Control


def rollout_of(name: str, engine: Engine, control: Control) -> Rollout:
    """name: `rollout.engine` of the job. engine: the policy's.

    Auto: Generate. With the attention kernels there are, one forward of ContinuousBatching is masked attention of all
    requests over the caches of all requests, whose work grows with the square of their number. On one CPU core (64
    prompts of 10 to 150 tokens, 2,500 sampled, up to 128 each) Generate took 2.2 s with 1.3 M parameters and 8.5 s
    with 12.5 M, ContinuousBatching 4.0 s and 11.6 s.
    """
    if name == "ContinuousBatching":
        return ContinuousBatching(engine, control)
    return Generate(engine, control)
