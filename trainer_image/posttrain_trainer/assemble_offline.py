"""The data of the stages that learn from rows: token sets, what they are compared with, the evaluation.

Called by assemble. Makes and hands over; does nothing with what it made.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from posttrain_api.reasons import Reason
from posttrain_trainer.algorithms.base import Algorithm
from posttrain_trainer.batching import Feed, Share
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.evaluate import Evaluator
from posttrain_trainer.job import Job
from posttrain_trainer.objective import StartLoss
from posttrain_trainer.prepared import Prepared
from posttrain_trainer.reference import Reference
from posttrain_trainer.reference_choice import Compared
from posttrain_trainer.tokenset import TokenSet


@dataclass(frozen=True)
class Offline:
    """What assemble has made already."""

    job: Job
    part: Share
    algorithm: Algorithm
    compared: Compared

    def parts(self) -> dict[str, Any]:
        """Of `Parts`, by name."""
        return {
            "feed": self.feed(),
            "evaluator": self.evaluator(),
            "reference": self._references[0],
            "start": self.start(),
        }

    def feed(self) -> Feed:
        """The source of steps."""
        tokens = self._sets[0][1]
        return Feed(tokens, self.job.sampler(tokens.sources), self.part)

    def evaluator(self) -> Evaluator | None:
        """None where there is no held-out set."""
        if len(self._sets) == 1:
            return None
        return Evaluator(self._sets[1][1], self.part, self.algorithm, self.job.runtime, self._references[1])

    def start(self) -> StartLoss | None:
        """What the first loss must be."""
        return self.compared.start(self.algorithm)

    @cached_property
    def _sets(self) -> list[tuple[Path, TokenSet]]:
        return _sets(self.job.prepared)

    @cached_property
    def _references(self) -> list[Reference | None]:
        return self.compared.references(self.algorithm, self._sets)


def _sets(prepared: Prepared) -> list[tuple[Path, TokenSet]]:
    """The training set, and the held-out set where there is one, each with its folder."""
    folders = [Path(folder) for folder in (prepared.train_dir, prepared.eval_dir) if folder is not None]
    return [(folder, _tokens(folder)) for folder in folders]


def _tokens(folder: Path) -> TokenSet:
    try:
        return TokenSet(folder)
    except FileNotFoundError as error:
        raise TrainerFailure(
            Reason.DATASET_NOT_FOUND,
            f"{folder}: the prepared token set is incomplete ({error.filename} is missing). "
            "Remove the prepared folder and run the job anew.",
        ) from error
