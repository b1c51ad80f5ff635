"""Sharing and cutting: every row once, equal counts, the budget kept, nothing lost in padding."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from trainer_kit import rows, write_tokens

from posttrain_trainer.batching import Feed, Share, cut, plan, share, whole_set
from posttrain_trainer.microbatch import MicroBatch, collate
from posttrain_trainer.sampler import Sampler
from posttrain_trainer.tokenset import Example, TokenSet, TrainingRow

LENGTHS = (
    st.integers(1, 2)
    .flatmap(
        lambda arity: st.lists(st.lists(st.integers(1, 300), min_size=arity, max_size=arity), min_size=1, max_size=60)
    )
    .map(lambda values: np.array(values, dtype=np.int64))
)
RANKS = st.integers(1, 9)
BUDGETS = st.integers(1, 2000)


@given(LENGTHS, RANKS, BUDGETS, st.booleans())
def test_every_row_once_and_equal_counts(lengths: np.ndarray, ranks: int, budget: int, packed: bool) -> None:
    plans = plan(lengths, Share(0, ranks, budget, packed=packed))
    assert len(plans) == ranks
    assert sorted(row for micros in plans for micro in micros for row in micro) == list(range(len(lengths)))
    assert len({len(micros) for micros in plans}) == 1


@given(LENGTHS, BUDGETS)
def test_the_budget_counts_padding(lengths: np.ndarray, budget: int) -> None:
    for micro in cut(range(len(lengths)), lengths, Share(0, 1, budget)):
        padded = lengths[micro].size * int(lengths[micro].max())
        assert padded <= budget or len(micro) == 1


@given(LENGTHS, BUDGETS)
def test_packed_rows_fill_the_budget(lengths: np.ndarray, budget: int) -> None:
    """No padding counts, and two micro-batches in a row never fit into one."""
    micros = cut(range(len(lengths)), lengths, Share(0, 1, budget, packed=True))
    loads = [int(lengths[micro].sum()) for micro in micros]
    assert all(load <= budget or len(micro) == 1 for load, micro in zip(loads, micros, strict=True))
    assert all(one + other > budget for one, other in pairwise(loads))


@given(LENGTHS, RANKS)
def test_work_is_even(lengths: np.ndarray, ranks: int) -> None:
    loads = [int(lengths[rows_].sum()) for rows_ in share(lengths, ranks)]
    assert max(loads) - min(loads) <= int(lengths.sum(axis=1).max())


@given(st.lists(st.integers(2, 30), min_size=1, max_size=8), st.integers(0, 100), st.booleans(), st.booleans())
def test_counted_positions_survive(lengths: list[int], seed: int, whole: bool, packed: bool) -> None:
    """Padded and packed: each counted position has its own sequence's tokens before it and its own target."""
    generator = np.random.default_rng(seed)
    examples = []
    for length in lengths:
        mask = generator.integers(0, 2, length).astype(np.uint8)
        mask[0] = 0
        examples.append(Example(generator.integers(1, 50, length).astype(np.int32), mask))
    micro = collate([TrainingRow((example,), {}) for example in examples], whole, packed)
    assert micro.tokens == sum(lengths)
    expected = [
        (number, int(token), example.tokens[:position].tolist())
        for number, example in enumerate(examples)
        for position, token in enumerate(example.tokens)
        if example.mask[position]
    ]
    places = zip(micro.sequence.tolist(), micro.targets.tolist(), micro.index.tolist(), strict=True)
    assert [(number, target, _before(micro, index)) for number, target, index in places] == expected
    ends = [_before(micro, index) for index in micro.ends.tolist()]
    assert ends == [example.tokens[: None if whole else -1].tolist() for example in examples]


def _before(micro: MicroBatch, index: int) -> list[int]:
    """The tokens that a causal model sees at a flattened position."""
    width = micro.input_ids.shape[1]
    position = index % width if micro.positions is None else int(micro.positions.flatten()[index])
    return micro.input_ids.flatten()[index - position : index + 1].tolist()


def test_ranks_share_a_step_and_dummies_fill(tmp_path: Path) -> None:
    write_tokens(tmp_path, rows(10))
    tokens = TokenSet(tmp_path)
    sampler = Sampler(10, 4, 10, 0)
    feeds = [Feed(tokens, sampler, Share(rank, 3, 30)) for rank in range(3)]
    for step in range(sampler.steps):
        micros = [feed.micros(step) for feed in feeds]
        assert len({len(each) for each in micros}) == 1
        expected = sum(int(tokens.lengths(np.array([row])).sum()) for row in sampler.rows(step))
        assert sum(micro.tokens for each in micros for micro in each) == expected
    last = [micro for feed in feeds for micro in feed.micros(2)]  # two rows for three ranks
    assert [micro.tokens > 0 for micro in last].count(False) >= 1
    assert all(float(micro.weights.sum()) == 0 for micro in last if micro.tokens == 0)


def test_the_whole_set_once_over_ranks(tmp_path: Path) -> None:
    write_tokens(tmp_path, rows(11))
    tokens = TokenSet(tmp_path)
    parts = [list(whole_set(tokens, Share(rank, 2, 40))) for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    assert sum(micro.tokens for part in parts for micro in part) == int(tokens.lengths().sum())
