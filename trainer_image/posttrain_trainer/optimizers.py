"""The optimizer that the trainer hands to DeepSpeed: torch's AdamW, and which weights decay. Used by assemble."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class AdamSettings:
    """AdamW (Loshchilov, Hutter 2019); its decay comes with the parameter groups."""

    beta1: float
    beta2: float
    epsilon: float


MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def adamw(settings: AdamSettings) -> MakeOptimizer:
    """Makes torch's AdamW; the loop sets the rate before each step."""

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)

    return make


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with decay; vectors (norms, biases) without. No group is empty."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def names_by_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The parameters of each group, by the model's names, in the optimizer's order. Before DeepSpeed has it: then its
    groups are flat tensors without names."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
