"""Dropout switched off for good: by assemble, for the stages that compare forwards.

A preference or a reward is a difference of two forwards, an importance ratio in stage RL one of log-probabilities;
dropout would put noise of its own into both (TRL switches it off for the first two, and for PPO). The model stays in
training mode, which gradient checkpointing asks for.
"""

from __future__ import annotations

from torch import nn


def without_dropout(model: nn.Module) -> None:
    """Dropout modules, and the rates that attention layers keep as numbers of their own."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
