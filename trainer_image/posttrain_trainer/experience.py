"""The samples of one rollout with what is known of them: the table that an online step trains on.

Made by the collector, the same on every rank, so that advantages, groups and shares do not depend on where a sample
was drawn. Numbers by token are flat, sample after sample; `by_sample` cuts them. It has the face of a token set, so
that updates are shared and cut into micro-batches as everything else is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from posttrain_trainer.tokenset import Example, TrainingRow

Floats = NDArray[np.float32]
"""One number per completion token of all samples, flat."""

OLD, ROLLOUT, REFERENCE, VALUE = "old", "rollout", "reference", "value"
"""log p of each token under the policy before the step's updates, as the rollout engine says, and under the reference;
the critic's V of the state before the token."""


@dataclass(frozen=True)
class Experience:
    """n samples. prompts, completions: int32 each; ended bool [n]: by a stop token; group int64 [n]: which samples
    have one prompt, counted from 0; rewards float64 [n, k] unweighted, NaN where skipped; weights [k]; each: by name,
    of every completion token."""

    prompts: tuple[NDArray[np.int32], ...]
    completions: tuple[NDArray[np.int32], ...]
    ended: NDArray[np.bool_]
    group: NDArray[np.int64]
    rewards: NDArray[np.float64]
    weights: tuple[float, ...] = (1.0,)
    each: Mapping[str, Floats] = field(default_factory=dict)

    def __len__(self) -> int:
        """Samples."""
        return len(self.completions)

    @property
    def groups(self) -> int:
        """How many there are."""
        return len(np.unique(self.group))

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Completion tokens of each sample, int64 [n]."""
        return np.array([len(tokens) for tokens in self.completions], dtype=np.int64)

    @cached_property
    def reward(self) -> NDArray[np.float64]:
        """Σ weight · value of each sample, float64 [n]; skipped rewards add nothing; NaN where all were skipped."""
        total = np.nansum(self.rewards * np.asarray(self.weights), axis=1)
        return np.where(np.isnan(self.rewards).all(axis=1), np.nan, total)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each sample's numbers begin in a flat array, and its end: int64 [n + 1]."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    def by_sample(self, flat: Floats) -> list[Floats]:
        """Views of a flat array, one per sample."""
        return np.split(flat, self.offsets[1:-1])

    def spread(self, values: NDArray[np.float64] | NDArray[np.float32]) -> Floats:
        """One number per sample [n] → one per token."""
        return np.repeat(values, self.sizes).astype(np.float32)

    def having(self, **each: Floats) -> Experience:
        """With further numbers by token."""
        return replace(self, each={**self.each, **each})

    def only(self, chosen: NDArray[np.int64]) -> Experience:
        """These samples, their groups counted from 0."""
        parts = {name: self.by_sample(flat) for name, flat in self.each.items()}
        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in chosen),
            completions=tuple(self.completions[row] for row in chosen),
            ended=self.ended[chosen],
            group=np.unique(self.group[chosen], return_inverse=True)[1],
            rewards=self.rewards[chosen],
            each={name: np.concatenate([part[row] for row in chosen] or [_EMPTY]) for name, part in parts.items()},
        )

    def __getitem__(self, row: int) -> TrainingRow:
        """Prompt and completion, the completion's tokens counted."""
        prompt, completion = self.prompts[row], self.completions[row]
        start, stop = self.offsets[row], self.offsets[row + 1]
        mask = np.zeros(len(prompt) + len(completion), dtype=np.uint8)
        mask[len(prompt) :] = 1
        numbers = {name: flat[start:stop] for name, flat in self.each.items()}
        return TrainingRow((Example(np.concatenate([prompt, completion]), mask, numbers),), {})

    def lengths(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Tokens of these samples (None: of all), int64 [rows, 1]."""
        whole = np.array([len(prompt) for prompt in self.prompts], dtype=np.int64) + self.sizes
        return (whole if rows is None else whole[rows])[:, None]


_EMPTY: Floats = np.empty(0, dtype=np.float32)


def joined(parts: Sequence[Experience]) -> Experience:
    """Of one rollout in several parts; the groups of a later part are counted on."""
    firsts = np.cumsum([0, *(part.groups for part in parts)])
    names = parts[0].each.keys()
    return Experience(
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        completions=tuple(tokens for part in parts for tokens in part.completions),
        ended=np.concatenate([part.ended for part in parts]),
        group=np.concatenate([part.group + first for part, first in zip(parts, firsts, strict=False)]),
        rewards=np.concatenate([part.rewards for part in parts]),
        weights=parts[0].weights,
        each={name: np.concatenate([part.each[name] for part in parts]) for name in names},
    )
