"""Which rows a step trains on: a pure function of (seed, position), the same for every world size.

Called by the feed of the loop. There is no iterator and so no state to save: a resumed job asks for the same
positions and gets the same rows. The order of an epoch is a keyed permutation computed point by point (a Feistel
network with cycle walking), so memory does not grow with the data. Nothing here may look at ranks, time or global
random state.

Several sources with weights: an epoch has so many places of each, all shuffled together. The places of a source go
through permutations of it one after the other, over the borders of epochs: at weight 0.5 an epoch has the half that
the one before had not, at 1.5 each row once and one half of them again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Part:
    """A source of the set: its rows, and how many rows of it an epoch has."""

    rows: int
    taken: int


@dataclass(frozen=True)
class Sampler:
    """Rows of each step. `size`: rows of an epoch; `total`: rows to train on over all epochs, repeats counted; `parts`:
    the sources, where an epoch is not simply each row of the set once."""

    size: int
    batch_size: int
    total: int
    seed: int
    parts: tuple[Part, ...] = ()

    @property
    def steps(self) -> int:
        """Optimizer steps until `total` rows are used up; the last one may be smaller."""
        return math.ceil(self.total / self.batch_size)

    def rows(self, step: int) -> NDArray[np.int64]:
        """Row indices of `step` (from 0), int64 [batch size, or less in the last step]. IndexError past the end."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        return self.at(np.arange(step * self.batch_size, self.consumed(step + 1)))

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row indices at these places of the order, which never ends. int64, as many."""
        if all(part.rows == part.taken for part in self.parts):
            return row_at(positions, self.size, self.seed)
        return mixed_at(positions, self.parts, self.seed)

    def consumed(self, steps: int) -> int:
        """Rows used up after `steps` steps."""
        return min(steps * self.batch_size, self.total)

    def epoch(self, steps: int) -> float:
        """Epochs done after `steps` steps."""
        return self.consumed(steps) / self.size


def total_rows(size: int, batch_size: int, epochs: float | None, max_steps: int | None) -> int:
    """Rows of the whole training: `max_steps` full batches where it is given, else epochs × size, rounded up."""
    if max_steps is not None:
        return max_steps * batch_size
    # 1e-9: 0.1 × 30 is 3.0000000000000004 in floating point and must not be four rows.
    return max(1, math.ceil((1.0 if epochs is None else epochs) * size - 1e-9))


def row_at(positions: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """The row at each position. Positions [k·size, (k+1)·size) are epoch k: a permutation of range(size) of its own."""
    epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), size)
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    keys = _mix(_mix(np.uint64(seed % 2**64)) ^ epochs.astype(np.uint64))
    values = offsets.astype(np.uint64)
    pending = np.arange(len(values))
    while len(pending):  # cycle walking: the network permutes [0, 4^half) and is applied until it lands inside
        values[pending] = _feistel(values[pending], keys[pending], half)
        pending = pending[values[pending] >= size]
    return values.astype(np.int64)


def mixed_at(positions: NDArray[np.int64], parts: Sequence[Part], seed: int) -> NDArray[np.int64]:
    """The row of the set at each position, where an epoch has `taken` rows of each part. Sources follow each other in
    the set."""
    taken = np.array([part.taken for part in parts], dtype=np.int64)
    ends = np.cumsum(taken)
    epochs = np.asarray(positions, dtype=np.int64) // ends[-1]
    places = row_at(positions, int(ends[-1]), seed)
    sources = np.searchsorted(ends, places, side="right")
    within = epochs * taken[sources] + places - (ends - taken)[sources]
    rows, first = np.empty_like(places), 0
    for number, part in enumerate(parts):
        here = sources == number
        if here.any():
            rows[here] = first + row_at(within[here], part.rows, _seed_of(seed, number))
        first += part.rows
    return rows


def _seed_of(seed: int, number: int) -> int:
    """Of a source's own order: two sources of one size must not go the same way."""
    return int(_mix(np.uint64((seed + 0x51ED2701 * (number + 1)) % 2**64))[0])


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], half: int) -> NDArray[np.uint64]:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(number))) & mask)
    return (left << shift) | right


def _mix(value: np.uint64 | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    mixed = np.atleast_1d(np.asarray(value, dtype=np.uint64)) + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
