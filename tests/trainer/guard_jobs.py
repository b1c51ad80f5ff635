"""What forked ranks run in the tests of guards. A module of its own: forked ranks import it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import resume_jobs
import torch

from posttrain_trainer.algorithms.language_modeling import LanguageModeling


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
