"""The learning rate of each step: a pure function of the step number, so that it has no state to save.

Called by the loop before each optimizer step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then cosine or linear decay to `min_ratio` × peak, or constant."""

    kind: Literal["Cosine", "Linear", "Constant"]
    peak: float
    warmup_steps: int
    total_steps: int
    min_ratio: float

    def rate(self, step: int) -> float:
        """Learning rate of `step` (from 0)."""
        return self.peak * self.factor(step)

    def factor(self, step: int) -> float:
        """Rate over peak. Warm-up: (step + 1) / (warmup + 1), so no step is lost with a rate of zero; decay: over
        progress p = (step − warmup) / (total − warmup), cosine (1 + cos πp) / 2 or linear 1 − p, scaled into
        [min_ratio, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.kind == "Constant":
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        shape = 1.0 - progress if self.kind == "Linear" else (1.0 + math.cos(math.pi * progress)) / 2.0
        return self.min_ratio + (1.0 - self.min_ratio) * shape
