"""What the collector asks of rewards: one number per completion and reward, or none.

A reward never looks like a dead collective: every call has a deadline, runs beside the rank, and what goes wrong is
reported by the reward's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Completion:
    """One sample as rewards see it. prompt, text: decoded without special tokens; prompt_tokens, tokens int32 as
    sampled; ended: whether a stop token ended it; columns: every other column of the row; number: its row in the
    prompt set."""

    prompt: str
    text: str
    prompt_tokens: NDArray[np.int32]
    tokens: NDArray[np.int32]
    ended: bool
    columns: Mapping[str, Any]
    number: int


@dataclass(frozen=True)
class Scored:
    """values float64 [n, rewards], unweighted; NaN: skipped (None from the reward, or onError: Skip). seconds and
    failures by reward's name, of this rank."""

    values: NDArray[np.float64]
    seconds: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)


class Rewards(Protocol):
    """All rewards of a job on one rank."""

    @property
    def names(self) -> tuple[str, ...]:
        """In order of the columns of `values`."""
        ...

    @property
    def weights(self) -> tuple[float, ...]:
        """Σ weight · value is a completion's reward."""
        ...

    def score(self, completions: Sequence[Completion]) -> Scored:
        """All ranks call it together, with any number of completions each (a reward model may be sharded).
        TrainerFailure(RewardError), with the reward's name, where `onError` is Fail: raised on every rank."""

    def close(self) -> None:
        """Ends the worker processes."""
