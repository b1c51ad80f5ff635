"""The order of rows: a permutation in each epoch, a function of seed and position alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_trainer.sampler import Sampler, row_at, total_rows

SIZES = st.integers(1, 700)
SEEDS = st.integers(0, 2**63 - 1)


@given(SIZES, SEEDS, st.integers(0, 1000))
def test_each_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    rows = row_at(np.arange(epoch * size, (epoch + 1) * size), size, seed)
    assert sorted(rows.tolist()) == list(range(size))


@given(SIZES, SEEDS, st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_a_position_has_its_row_whatever_is_asked_beside_it(size: int, seed: int, positions: list[int]) -> None:
    together = row_at(np.array(positions), size, seed).tolist()
    assert together == [int(row_at(np.array([position]), size, seed)[0]) for position in positions]


@given(SIZES, st.integers(1, 50), st.integers(1, 2000), SEEDS)
def test_steps_cut_the_positions_without_gap(size: int, batch: int, total: int, seed: int) -> None:
    sampler = Sampler(size, batch, total, seed)
    joined = np.concatenate([sampler.rows(step) for step in range(sampler.steps)])
    assert joined.tolist() == row_at(np.arange(total), size, seed).tolist()
    assert all(len(sampler.rows(step)) == batch for step in range(sampler.steps - 1))
    assert sampler.consumed(sampler.steps) == total
    assert sampler.epoch(sampler.steps) == pytest.approx(total / size)


def test_epochs_and_seeds_differ() -> None:
    size = 200
    first = row_at(np.arange(size), size, 0)
    assert first.tolist() != list(range(size))
    assert first.tolist() != row_at(np.arange(size, 2 * size), size, 0).tolist()
    assert first.tolist() != row_at(np.arange(size), size, 1).tolist()


def test_looks_random() -> None:
    """Mean and neighbour correlation of 10,000 positions are within four standard errors of a random order."""
    size = 10_000
    ranks = row_at(np.arange(size), size, 5).astype(float)
    correlation = np.corrcoef(ranks[:-1], ranks[1:])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(size)
    assert abs(ranks[: size // 10].mean() - size / 2) < 4 * size / np.sqrt(12 * size / 10)


def test_past_the_end() -> None:
    with pytest.raises(IndexError):
        Sampler(10, 4, 10, 0).rows(3)


@pytest.mark.parametrize(
    ("size", "batch", "epochs", "max_steps", "total"),
    [
        (10, 4, 1.0, None, 10),
        (10, 4, 2.5, None, 25),
        (30, 4, 0.1, None, 3),
        (10, 4, None, 7, 28),
        (3, 4, 0.01, None, 1),
    ],
)
def test_total(size: int, batch: int, epochs: float | None, max_steps: int | None, total: int) -> None:
    assert total_rows(size, batch, epochs, max_steps) == total
