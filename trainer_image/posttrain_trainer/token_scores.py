"""One number per completion token of a rollout from a model: log-probabilities or values, without gradient.

Called by the collector. The samples are shared over the ranks and cut as for training; what each rank found is put
together again, so that every rank has all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from posttrain_trainer.batching import Share, micros_of
from posttrain_trainer.experience import Experience, Floats
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.runtime import Runtime

Score = Callable[[MicroBatch], Tensor]
"""Micro-batch on this rank's device → [n], one number per counted token. All ranks call it together."""


@dataclass(frozen=True)
class TokenScores:
    """Scores rollouts on all ranks together."""

    part: Share
    runtime: Runtime

    @torch.no_grad()
    def of(self, experience: Experience, score: Score, stopping: Callable[[], bool]) -> Floats | None:
        """float32 [completion tokens of all samples]; None where the ranks agreed to stop."""
        found: dict[int, Floats] = {}
        for micro in micros_of(experience, np.arange(len(experience)), self.part):
            if stopping():
                return None
            values = score(micro.to(self.runtime.device)).float().cpu().numpy()
            if micro.tokens:  # not a dummy
                counts = [len(experience.completions[number]) for number in micro.numbers]
                found |= dict(zip(micro.numbers, np.split(values, np.cumsum(counts)[:-1]), strict=True))
        merged = {number: values for part in self.runtime.control.gather(found) for number, values in part.items()}
        return np.concatenate([merged[number] for number in range(len(experience))])
