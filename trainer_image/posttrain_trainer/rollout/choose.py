"""Which rollout engine a job gets. Called by assemble, once."""

from __future__ import annotations

from posttrain_trainer.engine import Engine
from posttrain_trainer.rollout.base import Rollout
from posttrain_trainer.rollout.generate import Generate
from posttrain_trainer.runtime import Control


def rollout_of(name: str, engine: Engine, control: Control) -> Rollout:
    """name: `rollout.engine` of the job. engine: the policy's."""
    return Generate(engine, control)
