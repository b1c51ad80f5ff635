"""Which evaluation is the best so far (evaluation.keepBest). Pure.

Called by the loop after each evaluation; what it says is part of the checkpoint's state, so that a resumed job goes on
judging where the killed one stopped. It saves, keeps and exports nothing: checkpoint.py and best_export.py do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from posttrain_api.names import BEST_DIR
from posttrain_api.reasons import Reason
from posttrain_api.records import Best
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.metrics import Metrics


@dataclass(frozen=True)
class Judge:
    """`metric`: a name that the evaluation gives; `sign` 1 where more is better, -1 where less is; `uri`: where the
    best model will be."""

    metric: str
    sign: float
    uri: str

    def choose(self, best: Best | None, step: int, evaluation: Metrics) -> Best | None:
        """The better of the best so far and this evaluation; of equals the earlier, and never NaN or infinity.
        TrainerFailure(ImageIncompatible) where the evaluation has no such metric."""
        if self.metric not in evaluation:
            raise TrainerFailure(
                Reason.IMAGE_INCOMPATIBLE,
                f"spec.evaluation.metric is {self.metric!r}, but the evaluation at step {step} gives "
                f"{', '.join(sorted(evaluation))}. Take one of these names, or switch evaluation.keepBest off.",
            )
        value = evaluation[self.metric]
        if not math.isfinite(value) or (best is not None and self.sign * value <= self.sign * best.value):
            return best
        return Best(step=step, metric=self.metric, value=value, uri=self.uri)


def judge_of(config: TrainerConfig) -> Judge | None:
    """The judge of a job; None where it does not keep the best."""
    evaluation = config.evaluation
    if not evaluation.keep_best:
        return None
    sign = 1.0 if evaluation.goal == "Maximize" else -1.0
    return Judge(evaluation.metric, sign, f"{config.run_uri.rstrip('/')}/{BEST_DIR}")
