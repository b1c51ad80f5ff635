"""Evaluation of stage RL: one sample for each held-out prompt, and what its rewards say.

Called by the loop as the evaluation of the other stages is. Seeds follow from the job's seed and the prompt alone, so
that evaluations of one job differ by the weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from posttrain_trainer.drawing import Drawer, Drawn, Order
from posttrain_trainer.engine import Engine
from posttrain_trainer.groups import together
from posttrain_trainer.metrics import Metrics, Phases
from posttrain_trainer.rollout_metrics import metrics_of

SEEDS = -1
"""In the place of a step: no step's samples have the same seeds."""


@dataclass(frozen=True)
class OnlineEvaluator:
    """drawer: of the held-out prompts; block: prompts that are sampled together."""

    drawer: Drawer
    block: int

    def run(self, engine: Engine, stopping: Callable[[], bool]) -> Metrics | None:
        """eval_reward and what else is reported of a rollout, as eval_*; None where `stopping` became true."""
        parts: list[Drawn] = []
        for order in self._orders():
            drawn = self.drawer.draw(order, stopping, Phases())
            if drawn is None:
                return None
            parts.append(drawn)
        metrics = metrics_of(together(parts), self.drawer.rewards.names)
        return {f"eval_{name}": value for name, value in metrics.items() if name not in _OF_GROUPS}

    def _orders(self) -> Iterator[Order]:
        for first in range(0, len(self.drawer.prompts), self.block):
            rows = np.arange(first, min(first + self.block, len(self.drawer.prompts)))
            yield Order(rows, rows, group_size=1, step=SEEDS)


_OF_GROUPS = ("reward_std", "frac_reward_zero_std")
