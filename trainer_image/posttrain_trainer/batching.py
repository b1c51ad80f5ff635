"""From the rows of one step to the micro-batches of each rank.

Called by the loop and the evaluation. Rows are shared over the ranks so that work is even, and each rank cuts its
rows into right-padded micro-batches of similar length under a token budget. There is no attention mask: with
padding on the right a causal model's real positions never see it. Every rank computes the whole plan from the
lengths, so no communication is needed to agree on the number of micro-batches. How rows are shared or cut never
changes the result, only the speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain_trainer.prepared import Example, TokenSet
from posttrain_trainer.sampler import Sampler


@dataclass(frozen=True)
class MicroBatch:
    """One forward. The row's last token is a target only, so T is the longest row less one.

    input_ids [b, T] int64; index [n]: counted positions in the flattened [b·T]; targets [n]: the token that follows
    each; weights [n] float32, all 0 in a dummy; tokens: real tokens of its rows, 0 in a dummy.
    """

    input_ids: Tensor
    index: Tensor
    targets: Tensor
    weights: Tensor
    tokens: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`."""
        if device.type == "cpu":
            return self
        tensors = (self.input_ids, self.index, self.targets, self.weights)
        ids, index, targets, weights = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return MicroBatch(ids, index, targets, weights, self.tokens)


def share(lengths: NDArray[np.int64], ranks: int) -> list[list[int]]:
    """Rows of each rank: the longest row first, each to the rank with the fewest tokens so far."""
    loads = [(0, 0, rank) for rank in range(ranks)]
    rows: list[list[int]] = [[] for _ in range(ranks)]
    for row in _longest_first(lengths):
        tokens, count, rank = min(loads)
        rows[rank].append(row)
        loads[rank] = (tokens + int(lengths[row]), count + 1, rank)
    return rows


def cut(rows: Sequence[int], lengths: NDArray[np.int64], budget: int) -> list[list[int]]:
    """Micro-batches of similar length: count × longest ≤ budget, but never less than one row."""
    micros: list[list[int]] = []
    longest = 0
    for row in sorted(rows, key=lambda row: (-int(lengths[row]), row)):
        if not micros or (len(micros[-1]) + 1) * longest > budget:
            micros.append([])
            longest = int(lengths[row])
        micros[-1].append(row)
    return micros


def plan(lengths: NDArray[np.int64], ranks: int, budget: int) -> list[list[list[int]]]:
    """[rank][micro-batch] → rows; an empty list is a dummy, so that all ranks have equally many."""
    plans = [cut(rows, lengths, budget) for rows in share(lengths, ranks)]
    most = max(len(micros) for micros in plans)
    return [micros + [[] for _ in range(most - len(micros))] for micros in plans]


def collate(examples: Sequence[Example]) -> MicroBatch:
    """Pads on the right with token 0, which no counted position ever sees."""
    width = max(1, max(len(example.tokens) for example in examples) - 1)
    ids = np.zeros((len(examples), width), dtype=np.int64)
    index, targets = [], []
    for number, example in enumerate(examples):
        ids[number, : len(example.tokens) - 1] = example.tokens[:-1]
        counted = np.flatnonzero(example.mask[1:])
        index.append(number * width + counted)
        targets.append(example.tokens[1:][counted])
    positions = torch.from_numpy(np.concatenate(index).astype(np.int64))
    wanted = torch.from_numpy(np.concatenate(targets).astype(np.int64))
    tokens = sum(len(example.tokens) for example in examples)
    return MicroBatch(torch.from_numpy(ids), positions, wanted, torch.ones(len(wanted)), tokens)


def dummy(example: Example) -> MicroBatch:
    """Keeps the collectives of a rank without rows in step: two real tokens, weight 0."""
    ids = torch.from_numpy(np.asarray(example.tokens[:1], dtype=np.int64))[None]
    target = torch.from_numpy(np.asarray(example.tokens[-1:], dtype=np.int64))
    return MicroBatch(ids, torch.zeros(1, dtype=torch.int64), target, torch.zeros(1), tokens=0)


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's, and how large a micro-batch may be (tokens, padding counted)."""

    rank: int
    ranks: int
    budget: int


class Feed:
    """The training set of one rank, by step."""

    def __init__(self, tokens: TokenSet, sampler: Sampler, part: Share) -> None:
        self.sampler = sampler
        self._tokens = tokens
        self._part = part

    def micros(self, step: int) -> list[MicroBatch]:
        """Micro-batches of this rank for `step`; all ranks have equally many."""
        rows = self.sampler.rows(step)
        lengths = self._tokens.offsets[rows + 1] - self._tokens.offsets[rows]
        micros = plan(lengths, self._part.ranks, self._part.budget)[self._part.rank]
        return [self._build(rows, micro) for micro in micros]

    def _build(self, rows: NDArray[np.int64], micro: list[int]) -> MicroBatch:
        return build(self._tokens, [int(rows[number]) for number in micro])


def build(tokens: TokenSet, rows: Sequence[int]) -> MicroBatch:
    """The micro-batch of these rows; a dummy where there are none."""
    return collate([tokens[row] for row in rows]) if rows else dummy(tokens[0])


def whole_set(tokens: TokenSet, part: Share) -> Iterator[MicroBatch]:
    """Every row of the set once, over all ranks: micro-batch i goes to rank i mod ranks; dummies fill the last
    round."""
    micros = cut(range(len(tokens)), tokens.lengths(), part.budget)
    rounds = -(-len(micros) // part.ranks)
    for number in range(part.rank, rounds * part.ranks, part.ranks):
        yield build(tokens, micros[number] if number < len(micros) else [])


def _longest_first(lengths: NDArray[np.int64]) -> list[int]:
    return [int(row) for row in np.argsort(-lengths, kind="stable")]
