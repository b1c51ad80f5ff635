"""References that are models: the policy's own engine, or a second model that never learns.

Made by assemble. A reference draws no random numbers and leaves no trace in the gradients; it runs before the policy's
forward, never between that and its backward: with gradient checkpointing the backward computes the forward again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain_trainer.engine import Engine, FrozenEngine, Trained
from posttrain_trainer.lora import adapter_scope
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.reference import with_reference


@dataclass(frozen=True)
class AdapterOff:
    """The policy's own engine without its adapter: the starting policy of a new adapter, for no memory."""

    engine: Engine

    def logp(self, micro: MicroBatch) -> Tensor:
        """[n] fp32 of the counted tokens. By the engine itself: past it, ZeRO-3 would miss its hooks."""
        with adapter_scope(self.engine.module, None):
            logp: Tensor = _still(self.engine, micro)[0]
        return logp

    def attach(self, micro: MicroBatch) -> MicroBatch:
        """One more forward."""
        return with_reference(micro, micro.by_sequence(self.logp(micro)))


@dataclass(frozen=True)
class Untrained:
    """The policy's own engine as it is: the starting policy before the first step, the old one before a step's
    updates."""

    engine: Engine

    def logp(self, micro: MicroBatch) -> Tensor:
        """[n] fp32 of the counted tokens."""
        logp: Tensor = said(self.engine, micro)[0]
        return logp

    def attach(self, micro: MicroBatch) -> MicroBatch:
        """One forward."""
        return with_reference(micro, micro.by_sequence(self.logp(micro)))


@dataclass(frozen=True)
class FrozenModel:
    """A second model: the starting policy's copy, or another one."""

    engine: FrozenEngine

    def logp(self, micro: MicroBatch) -> Tensor:
        """[n] fp32 of the counted tokens."""
        logp: Tensor = self.engine.forward(micro)[0]
        return logp

    def attach(self, micro: MicroBatch) -> MicroBatch:
        """One forward of the second model."""
        return with_reference(micro, micro.by_sequence(self.logp(micro)))


def said(role: Trained, micro: MicroBatch) -> Any:
    """What a role that learns says of a micro-batch, without gradient and dropout; its mode is as before after it."""
    with role.scope():
        return _still(role, micro)


@torch.no_grad()
def _still(role: Trained, micro: MicroBatch) -> Any:
    training = role.module.training
    role.train(False)
    try:
        return role.forward(micro)
    finally:
        role.train(training)
