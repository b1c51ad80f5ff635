"""What forked ranks run in the tests of guards. A module of its own: forked ranks import it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import resume_jobs
import torch

from posttrain_trainer.algorithms.language_modeling import LanguageModeling
from posttrain_trainer.rollout import generate
from posttrain_trainer.rollout.base import Sample


def poisoned(rank: int, after: int, folders: Sequence[str]) -> None:
    """One rank's loss becomes NaN in its `after`-th micro-batch (from 1) of these jobs."""
    losses, done = LanguageModeling.losses, [0]

    def losses_and_poison(algorithm: LanguageModeling, *given: Any) -> dict[str, torch.Tensor]:
        done[0] += 1
        found = losses(algorithm, *given)
        if os.environ["RANK"] == str(rank) and done[0] == after:
            return {name: value * float("nan") for name, value in found.items()}
        return found

    LanguageModeling.losses = losses_and_poison  # type: ignore[method-assign]
    resume_jobs.attempt(1, folders)


def misled(by: float, folders: Sequence[str]) -> None:
    """The sampling engine says other log-probabilities than it draws by."""
    finished = generate.finished

    def finished_and_lie(tokens: Sequence[int], logprobs: Sequence[float], *given: Any) -> Sample:
        return finished(tokens, [each - by for each in logprobs], *given)

    generate.finished = finished_and_lie
    resume_jobs.attempt(1, folders)
