"""References that are models: the policy's own engine, or a second model that never learns.

Made by assemble. A reference draws no random numbers and leaves no trace in the gradients; it runs before the policy's
forward, never between that and its backward: with gradient checkpointing the backward computes the forward again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from posttrain_trainer.engine import Engine, FrozenEngine
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.reference import with_reference


@dataclass(frozen=True)
class AdapterOff:
    """The policy's own engine without its adapter: the starting policy of a new adapter, for no memory."""

    engine: Engine

    def attach(self, micro: MicroBatch) -> MicroBatch:
        """One more forward of the engine itself: past it, ZeRO-3 would miss its hooks."""
        with adapters_off(self.engine.module):
            return _scored(self.engine, micro)


@dataclass(frozen=True)
class Untrained:
    """The policy's own engine as it is. It is the starting policy before the first step only: to fill a cache."""

    engine: Engine

    def attach(self, micro: MicroBatch) -> MicroBatch:
        """One forward."""
        return _scored(self.engine, micro)


@dataclass(frozen=True)
class FrozenModel:
    """A second model: the starting policy's copy, or another one."""

    engine: FrozenEngine

    def attach(self, micro: MicroBatch) -> MicroBatch:
        """One forward of the second model."""
        return with_reference(micro, micro.by_sequence(self.engine.forward(micro)[0]))


@torch.no_grad()
def _scored(engine: Engine, micro: MicroBatch) -> MicroBatch:
    """Without dropout; the engine's mode is as before after it."""
    training = engine.module.training
    engine.train(False)
    try:
        return with_reference(micro, micro.by_sequence(engine.forward(micro)[0]))
    finally:
        engine.train(training)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base alone inside. peft's own switches touch `requires_grad`, and DeepSpeed then drops gradients silently;
    this one touches nothing else."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was
