"""From the rows of one step to the micro-batches of each rank.

Called by the loop and the evaluation. Rows are shared over the ranks so that work is even, and each rank cuts its
rows into micro-batches of similar length under a token budget. Every rank computes the whole plan from the lengths,
so no communication is needed to agree on the number of micro-batches. How rows are shared or cut never changes the
result, only the speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from posttrain_trainer.microbatch import MicroBatch, collate, dummy
from posttrain_trainer.sampler import Sampler
from posttrain_trainer.state import OnlineState
from posttrain_trainer.steps import Collected, Visit
from posttrain_trainer.tokenset import TokenSet, TrainingRow

Lengths = NDArray[np.int64]
"""Tokens of each sequence, [rows, arity]."""
BLOCK_ROWS, MOST_ROWS = 4096, 2**18
"""Rows of a set, per rank and in all, whose lengths are looked at together."""


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's and what its micro-batches are like. budget: tokens of one, padding
    counted; whole: a sequence's last token is an input too; packed: all sequences in one line."""

    rank: int
    ranks: int
    budget: int
    whole: bool = False
    packed: bool = False


def share(lengths: Lengths, ranks: int) -> list[list[int]]:
    """Rows of each rank: the longest row first, each to the rank with the fewest tokens so far."""
    sizes = lengths.sum(axis=1)
    loads = [(0, 0, rank) for rank in range(ranks)]
    rows: list[list[int]] = [[] for _ in range(ranks)]
    for row in np.argsort(-sizes, kind="stable").tolist():
        tokens, count, rank = min(loads)
        rows[rank].append(row)
        loads[rank] = (tokens + int(sizes[row]), count + 1, rank)
    return rows


def cut(rows: Sequence[int], lengths: Lengths, part: Share) -> list[list[int]]:
    """Micro-batches of similar length under the budget, but never less than one row. Padded: sequences × longest;
    packed: all tokens."""
    longest, sizes, arity = lengths.max(axis=1), lengths.sum(axis=1), lengths.shape[1]

    def tokens(row: int, first: int) -> int:  # rows come by falling length: the first of a micro-batch is its longest
        return int(sizes[row]) if part.packed else arity * int(longest[first])

    micros: list[list[int]] = []
    used = 0
    for row in sorted(rows, key=lambda row: (-int(longest[row]), row)):
        if not micros or used + tokens(row, micros[-1][0]) > part.budget:
            micros.append([])
            used = 0
        micros[-1].append(row)
        used += tokens(row, micros[-1][0])
    return micros


def plan(lengths: Lengths, part: Share) -> list[list[list[int]]]:
    """[rank][micro-batch] → rows; an empty list is a dummy, so that all ranks have equally many."""
    plans = [cut(rows, lengths, part) for rows in share(lengths, part.ranks)]
    most = max(len(micros) for micros in plans)
    return [micros + [[] for _ in range(most - len(micros))] for micros in plans]


class Feed:
    """The training set of one rank, by step: one update each."""

    def __init__(self, tokens: TokenSet, sampler: Sampler, part: Share) -> None:
        self.sampler = sampler
        self._tokens = tokens
        self._part = part

    def collect(self, visit: Visit) -> Collected:
        """The micro-batches of the step."""
        with visit.phases.measure("data"):
            return Collected([self.micros(visit.step)])

    def epoch(self, steps: int, online: OnlineState | None) -> float:
        """Epochs done after `steps` steps."""
        return self.sampler.epoch(steps)

    def close(self) -> None:
        """Nothing runs beside it."""

    def micros(self, step: int) -> list[MicroBatch]:
        """Micro-batches of this rank for `step`; all ranks have equally many."""
        return micros_of(self._tokens, self.sampler.rows(step), self._part)


class Rows(Protocol):
    """Rows by number: a token set, or the samples of a rollout."""

    def __getitem__(self, row: int) -> TrainingRow: ...

    def lengths(self, rows: NDArray[np.int64] | None = None) -> Lengths:
        """Tokens of each sequence of these rows (None: of all)."""
        ...


def micros_of(tokens: Rows, rows: NDArray[np.int64], part: Share) -> list[MicroBatch]:
    """This rank's micro-batches of these rows; all ranks have equally many."""
    micros = plan(tokens.lengths(rows), part)[part.rank]
    return [build(tokens, [int(rows[number]) for number in micro], part) for micro in micros]


def build(tokens: Rows, rows: Sequence[int], part: Share) -> MicroBatch:
    """The micro-batch of these rows; a dummy, which looks like row 0, where there are none."""
    if not rows:
        return replace(dummy(tokens[0], part.whole, part.packed), numbers=(0,))
    return replace(collate([tokens[row] for row in rows], part.whole, part.packed), numbers=tuple(rows))


def whole_set(tokens: TokenSet, part: Share) -> Iterator[MicroBatch]:
    """Every row of the set once, over all ranks: micro-batch i of a block goes to rank i mod ranks; dummies fill its
    last round. Block by block, so that memory does not grow with the set."""
    block = min(BLOCK_ROWS * part.ranks, MOST_ROWS)
    for first in range(0, len(tokens), block):
        rows = np.arange(first, min(first + block, len(tokens)))
        micros = cut(range(len(rows)), tokens.lengths(rows), part)
        rounds = -(-len(micros) // part.ranks)
        for number in range(part.rank, rounds * part.ranks, part.ranks):
            yield build(tokens, rows[micros[number]].tolist() if number < len(micros) else [], part)
