"""The gradient's norm by role, where several roles have their parameters in one optimizer.

Used by the engine. DeepSpeed tells one norm, of everything; by role it is read where every ZeRO stage has to pass: just
before the optimizer's step, from the gradients of the parts that this rank keeps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

ROLE = "role"
"""Key of a parameter group that says whose it is."""


class RoleNorms:
    """Of the roles that the groups of `optimizer` name; nothing is done where they name none."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._roles = list(dict.fromkeys(group[ROLE] for group in optimizer.param_groups if ROLE in group))
        self._squares: dict[str, list[Tensor]] = {role: [] for role in self._roles}
        if self._roles:
            optimizer.register_step_pre_hook(self._before_step)

    def take(self, norm: float, device: torch.device) -> dict[str, float]:
        """norm: of the whole gradient → its parts by role. All ranks call it after each step; `device`: one that the
        process group can send from.

        ‖g_role‖ = ‖g‖ · √(Σ_role g² / Σ g²): a ratio, which neither clipping nor how often a rank's part is counted
        changes.
        """
        if not self._roles:
            return {}
        sums = torch.tensor([sum(map(float, self._squares[role])) for role in self._roles], device=device)
        torch.distributed.all_reduce(sums)
        squares = sums.tolist()
        total = sum(squares)
        self._squares = {role: [] for role in self._roles}
        return {
            role: norm * math.sqrt(square / total) if total > 0 else 0.0
            for role, square in zip(self._roles, squares, strict=True)
        }

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # ZeRO calls the optimizer once per group, with the other groups' parameters taken out.
        for group in optimizer.param_groups:
            self._squares[group[ROLE]] += [
                p.grad.double().square().sum() for p in group["params"] if p.grad is not None
            ]
