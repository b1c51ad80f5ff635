"""The order of rows: a permutation in each epoch, a function of seed and position alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_trainer.sampler import Part, Sampler, mixed_at, row_at, total_rows

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


PARTS = st.lists(
    st.tuples(st.integers(1, 60), st.floats(0.05, 3)).map(lambda each: Part(each[0], round(each[0] * each[1]))),
    min_size=1,
    max_size=4,
).filter(lambda parts: any(part.taken for part in parts))


def counts_of(parts: list[Part], seed: int, epochs: int) -> list[list[int]]:
    """[part][row] → how often it comes in the first epochs."""
    size = sum(part.taken for part in parts)
    found = np.bincount(mixed_at(np.arange(epochs * size), parts, seed), minlength=sum(part.rows for part in parts))
    return [each.tolist() for each in np.split(found, np.cumsum([part.rows for part in parts])[:-1])]


@given(PARTS, SEEDS, st.integers(1, 5))
def test_each_source_has_its_weight(parts: list[Part], seed: int, epochs: int) -> None:
    """Every epoch takes so many of a source, and all its rows equally often, give or take one."""
    for part, counts in zip(parts, counts_of(parts, seed, epochs), strict=True):
        assert sum(counts) == epochs * part.taken
        assert max(counts) - min(counts) <= 1


def test_half_a_weight_has_the_other_half_in_the_next_epoch() -> None:
    parts = [Part(40, 20), Part(10, 10), Part(6, 12)]
    first, whole, thin = counts_of(parts, 7, 1)
    assert (sum(first), whole, thin) == (20, [1] * 10, [2] * 6)
    assert counts_of(parts, 7, 2) == [[1] * 40, [2] * 10, [4] * 6]


@given(PARTS, SEEDS, st.lists(st.integers(0, 10**9), min_size=1, max_size=10))
def test_a_mixed_position_has_its_row_whatever_is_asked_beside_it(
    parts: list[Part], seed: int, positions: list[int]
) -> None:
    together = mixed_at(np.array(positions), parts, seed).tolist()
    assert together == [int(mixed_at(np.array([position]), parts, seed)[0]) for position in positions]


def test_sources_are_shuffled_together() -> None:
    rows = mixed_at(np.arange(3000), [Part(1000, 2000), Part(2000, 1000)], 0)
    first = (rows < 1000).astype(float)
    assert abs(first[:300].mean() - 2 / 3) < 4 * np.sqrt(2 / 9 / 300)  # four standard errors
    assert rows[:2000].tolist() != rows[1000:3000].tolist()


def test_weights_of_1_change_nothing() -> None:
    plain, mixed = Sampler(30, 4, 60, 5), Sampler(30, 4, 60, 5, (Part(10, 10), Part(20, 20)))
    assert all(plain.rows(step).tolist() == mixed.rows(step).tolist() for step in range(plain.steps))
