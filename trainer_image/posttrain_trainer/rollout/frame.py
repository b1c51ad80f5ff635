"""What every rollout engine does around its own way of sampling: borrow the model, check, agree when to stop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain_trainer.engine import Engine
from posttrain_trainer.rollout.base import Request, Sample, Sampling, Stopping
from posttrain_trainer.rollout.checks import check_requests, check_samples
from posttrain_trainer.rollout.policy import lent
from posttrain_trainer.rollout.room import tokens_that_fit
from posttrain_trainer.rollout.turns import Stopped, Turns
from posttrain_trainer.runtime import Control


@dataclass(frozen=True)
class Work:
    """What is sampled; budget: tokens that may be held at once, of prompts and completions."""

    requests: Sequence[Request]
    sampling: Sampling
    version: int
    budget: int


class Framed(ABC):
    """See rollout/base.py. `budget`: None: what the memory allows."""

    def __init__(self, engine: Engine, control: Control, budget: int | None = None) -> None:
        self._engine = engine
        self._control = control
        self._budget = budget

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, version: int, stopping: Stopping
    ) -> list[Sample] | None:
        """As Rollout.generate."""
        turns = Turns(self._control, stopping)
        with lent(self._engine) as model:
            check_requests(requests, sampling, model.config)
            work = Work(requests, sampling, version, self._budget or tokens_that_fit(model))
            try:
                samples = self.samples(model, work, turns)
                turns.finish()
            except Stopped:
                return None
        check_samples(samples)
        return samples

    @abstractmethod
    def samples(self, model: Any, work: Work, turns: Turns) -> list[Sample]:
        """One sample per request, in order. Raises Stopped."""
