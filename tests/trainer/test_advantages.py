"""From rewards to advantages, computed by hand, and what must hold for any rewards."""

from __future__ import annotations

import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

from posttrain_api.online import AdaptiveKL, OverlongPenalty
from posttrain_trainer.advantages import (
    Scaling,
    adapted,
    explained_variance,
    gae,
    group_advantages,
    leave_one_out,
    normalized,
    overlong,
    sums,
    whitened,
    zero_variance_share,
)

NAN = float("nan")
NUMBERS = st.floats(-10, 10, width=32)
SHARES = st.floats(0, 1)
Numbers = NDArray[np.float64]


@pytest.fixture(autouse=True)
def no_warnings() -> None:
    """numpy warns of means of nothing: there must be none."""
    warnings.simplefilter("error")


def _numbers(*values: float) -> Numbers:
    return np.array(values, dtype=np.float64)


def test_gae_by_hand() -> None:
    """γ = 1, λ = ½, r = (0, 1), V = (½, ¼): δ = (0 + ¼ − ½, 1 + 0 − ¼) = (−¼, ¾); A = (−¼ + ½·¾, ¾); R = A + V. The
    second sample has one token: A = r − V."""
    advantages, returns = gae(_numbers(0, 1, 2), _numbers(0.5, 0.25, 0.5), np.array([2, 1]), 1.0, 0.5)
    assert advantages.tolist() == [0.125, 0.75, 1.5]
    assert returns.tolist() == [0.625, 1.0, 2.0]


def test_gae_discounts() -> None:
    """γ = ½, λ = 1: A_0 = r_0 + ½·r_1 + ¼·r_2 − V_0 = 1 + 1 + 1 − 3."""
    advantages, returns = gae(_numbers(1, 2, 4), _numbers(3, 0, 0), np.array([3]), 0.5, 1.0)
    assert advantages.tolist() == [0.0, 4.0, 4.0]
    assert returns.tolist() == [3.0, 4.0, 4.0]


@st.composite
def samples(draw: st.DrawFn) -> tuple[Numbers, Numbers, NDArray[np.int64]]:
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    flat = st.lists(NUMBERS, min_size=sum(sizes), max_size=sum(sizes))
    return _numbers(*draw(flat)), _numbers(*draw(flat)), np.array(sizes)


@given(samples(), SHARES, SHARES)
def test_gae_of_each_sample_alone(made: tuple[Numbers, Numbers, NDArray[np.int64]], gamma: float, lam: float) -> None:
    """By the definition: Σ (γλ)^k δ_{t+k}."""
    rewards, values, sizes = made
    found, returns = gae(rewards, values, sizes, gamma, lam)
    expected = []
    for reward, value in zip(*(np.split(flat, np.cumsum(sizes)[:-1]) for flat in (rewards, values)), strict=True):
        delta = reward + gamma * np.append(value[1:], 0.0) - value
        steps = range(len(delta))
        expected += [sum((gamma * lam) ** (k - t) * delta[k] for k in steps if k >= t) for t in steps]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(returns, found + values, rtol=1e-12, atol=1e-12)


@given(samples())
def test_without_decay_returns_are_sums_of_rewards(made: tuple[Numbers, Numbers, NDArray[np.int64]]) -> None:
    rewards, values, sizes = made
    _, returns = gae(rewards, values, sizes, 1.0, 1.0)
    ahead = [np.cumsum(each[::-1])[::-1] for each in np.split(rewards, np.cumsum(sizes)[:-1])]
    np.testing.assert_allclose(returns, np.concatenate(ahead), rtol=1e-9, atol=1e-9)


def test_whitened_by_hand() -> None:
    """(1, 2, 3): mean 2, variance over n − 1 is 1. What does not count is 0 and changes nothing."""
    found = whitened(_numbers(1, 99, 2, 3), np.array([True, False, True, True]))
    np.testing.assert_allclose(found, [-1, 0, 0, 1], atol=1e-7)
    assert whitened(_numbers(5.0), np.array([True])).tolist() == [0.0]
    assert whitened(_numbers(5.0), np.array([False])).tolist() == [0.0]


REWARDS, GROUP = _numbers(1, 0, 0, 1, 5, 1), np.array([0, 0, 0, 1, 1, 1])
"""Means ⅓ and 7/3; variances over n − 1 ⅓ and 16/3."""


def test_group_advantages_by_hand() -> None:
    found = group_advantages(REWARDS, GROUP, Scaling(epsilon=0.0))
    expected = [2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5, -1 / 3**0.5]
    np.testing.assert_allclose(found, expected)
    plain = group_advantages(REWARDS, GROUP, Scaling("None"))
    np.testing.assert_allclose(plain, [2 / 3, -1 / 3, -1 / 3, -4 / 3, 8 / 3, -4 / 3])


def test_ddof_and_epsilon() -> None:
    """Over n: variance 2/9, so 2/3 / (√2/3 + ε)."""
    found = group_advantages(REWARDS, GROUP, Scaling(ddof=0, epsilon=0.5))
    assert found[0] == pytest.approx((2 / 3) / (2**0.5 / 3 + 0.5))
    assert group_advantages(REWARDS, GROUP, Scaling(ddof=1, epsilon=0.5))[0] == pytest.approx((2 / 3) / (3**-0.5 + 0.5))


def test_scaled_by_the_batch() -> None:
    """The deviation of all six rewards: mean 4/3, Σ (x − mean)² = 28 − 6·16/9 = 52/3, over 5."""
    found = group_advantages(REWARDS, GROUP, Scaling("Batch", epsilon=0.0))
    assert found[0] == pytest.approx((2 / 3) / (52 / 15) ** 0.5)
    assert found[4] == pytest.approx((8 / 3) / (52 / 15) ** 0.5)


@pytest.mark.parametrize("kind", ["Group", "Batch", "None"])
def test_skipped_rewards(kind: str) -> None:
    """They are in no baseline, and have advantage 0; so has the only one that is left, and a group of skipped ones."""
    rewards, group = _numbers(1, NAN, 0, NAN, NAN, 3, NAN), np.array([0, 0, 0, 1, 1, 2, 2])
    scaling = Scaling(kind, epsilon=0.0)  # type: ignore[arg-type]
    found = group_advantages(rewards, group, scaling)
    assert found[[1, 3, 4, 5, 6]].tolist() == [0.0] * 5
    assert found[0] == -found[2] > 0
    assert group_advantages(np.full(3, NAN), np.zeros(3, dtype=np.int64), scaling).tolist() == [0.0] * 3


def test_equal_rewards_have_no_advantage_at_all() -> None:
    """0.1 · 8 / 8 is not 0.1, and divided by a deviation of the same size it would be 1."""
    rewards, group = np.full(8, 0.1), np.zeros(8, dtype=np.int64)
    assert not group_advantages(rewards, group, Scaling(epsilon=0.0)).any()
    assert not leave_one_out(rewards, group).any()


@st.composite
def groups(draw: st.DrawFn) -> tuple[Numbers, NDArray[np.int64]]:
    count = draw(st.integers(2, 12))
    rewards = draw(st.lists(st.one_of(st.just(NAN), st.floats(-5, 5, width=16)), min_size=count, max_size=count))
    return _numbers(*rewards), np.array(draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))


SCALINGS = st.builds(Scaling, st.sampled_from(["Group", "Batch", "None"]), st.sampled_from([0, 1]), st.just(1e-4))


@given(groups(), SCALINGS, st.randoms())
def test_order_does_not_matter(made: tuple[Numbers, NDArray[np.int64]], scaling: Scaling, random_: object) -> None:
    """Samples of a group may lie on any rank, in any order."""
    rewards, group = made
    order = np.arange(len(rewards))
    random_.shuffle(order)  # type: ignore[attr-defined]
    for of in (lambda r, g: group_advantages(r, g, scaling), leave_one_out):
        np.testing.assert_allclose(of(rewards[order], group[order]), of(rewards, group)[order], rtol=1e-6, atol=1e-9)


@given(groups(), SCALINGS)
def test_advantages_of_a_group_are_balanced(made: tuple[Numbers, NDArray[np.int64]], scaling: Scaling) -> None:
    rewards, group = made
    found, others = group_advantages(rewards, group, scaling), np.nan_to_num(leave_one_out(rewards, group))
    assert np.isfinite(found).all()
    for number in set(group.tolist()):
        assert abs(found[group == number].sum()) < 1e-6 * max(1.0, np.abs(found).max())
        assert abs(others[group == number].sum()) < 1e-6
    assert not found[np.isnan(rewards)].any()


@given(groups(), st.floats(-3, 3, width=16))
def test_what_all_of_a_group_get_does_not_matter(made: tuple[Numbers, NDArray[np.int64]], more: float) -> None:
    rewards, group = made
    for scaling in (Scaling("Group"), Scaling("None")):
        moved = group_advantages(rewards + more * (group == 0), group, scaling)
        np.testing.assert_allclose(moved, group_advantages(rewards, group, scaling), rtol=1e-6, atol=1e-6)


@given(groups(), SCALINGS)
def test_skipped_samples_might_as_well_not_be_there(made: tuple[Numbers, NDArray[np.int64]], scaling: Scaling) -> None:
    rewards, group = made
    scored = ~np.isnan(rewards)
    found = group_advantages(rewards, group, scaling)[scored]
    np.testing.assert_allclose(found, group_advantages(rewards[scored], group[scored], scaling), rtol=1e-9, atol=1e-12)


def test_leave_one_out_by_hand() -> None:
    """(1, 0, 0): others' means 0, ½, ½. One skipped, and one alone."""
    found = leave_one_out(_numbers(1, 0, 0, NAN, 4), np.array([0, 0, 0, 0, 1]))
    np.testing.assert_allclose(found, [1.0, -0.5, -0.5, NAN, NAN])


@given(groups())
def test_leave_one_out_is_the_difference_stretched(made: tuple[Numbers, NDArray[np.int64]]) -> None:
    """R − mean of the others = n/(n − 1) · (R − mean)."""
    rewards, group = made
    found, plain = leave_one_out(rewards, group), group_advantages(rewards, group, Scaling("None"))
    for number in set(group.tolist()):
        chosen = (group == number) & ~np.isnan(rewards)
        count = int(chosen.sum())
        if count > 1:
            np.testing.assert_allclose(found[chosen], count / (count - 1) * plain[chosen], rtol=1e-6, atol=1e-7)


def test_normalized_by_hand() -> None:
    found = normalized(_numbers(1, 2, 3, NAN))
    np.testing.assert_allclose(found, _numbers(-1, 0, 1, NAN) / 1.0001)
    assert np.isnan(normalized(np.full(2, NAN))).all()
    assert normalized(_numbers(2.0)).tolist() == [0.0]


def test_zero_variance_share() -> None:
    """Equal, different, one left, none left."""
    rewards, group = _numbers(1, 1, 0, 1, 5, NAN, NAN, NAN), np.array([0, 0, 1, 1, 2, 2, 3, 3])
    assert zero_variance_share(rewards, group) == 0.75
    assert zero_variance_share(_numbers(), np.array([], dtype=np.int64)) == 0.0


def test_explained_variance() -> None:
    """Returns (1, 3), variance 1; errors (0, 1), variance ¼."""
    assert explained_variance(_numbers(1, 3), _numbers(1, 2)) == 0.75
    assert explained_variance(_numbers(1, 3), _numbers(1, 3)) == 1.0
    assert explained_variance(_numbers(1, 3), _numbers(7, 7)) == 0.0
    assert explained_variance(_numbers(1, 3), _numbers(3, 1)) == -3.0
    assert explained_variance(_numbers(2, 2), _numbers(0, 1)) == 0.0
    assert explained_variance(_numbers(), _numbers()) == 0.0


# Target 6, horizon 10,000, 256 samples. Columns: KL that was found, factor.
ADAPTED = [
    pytest.param(6.0, 1.0, id="as it should be"),
    pytest.param(6.6, 1 + 0.1 * 256 / 10_000, id="a tenth above"),
    pytest.param(60.0, 1 + 0.2 * 256 / 10_000, id="far above"),
    pytest.param(5.4, 1 - 0.1 * 256 / 10_000, id="a tenth below"),
    pytest.param(-1.0, 1 - 0.2 * 256 / 10_000, id="an estimate below zero"),
]


@pytest.mark.parametrize(("found", "factor"), ADAPTED)
def test_adaptive_kl(found: float, factor: float) -> None:
    assert adapted(0.05, found, 256, AdaptiveKL(target=6.0)) == pytest.approx(0.05 * factor, rel=1e-12)


def test_adaptive_kl_moves_by_a_fifth_at_most() -> None:
    settings = AdaptiveKL(target=6.0, horizon=100)
    assert adapted(0.05, -1.0, 512, settings) == pytest.approx(0.05 * 0.8, rel=1e-12)
    assert adapted(0.05, 60.0, 512, settings) == pytest.approx(0.05 * 1.2, rel=1e-12)


def test_overlong_penalty() -> None:
    """At most 10, a buffer of 4."""
    found = overlong(np.array([1, 6, 7, 8, 10]), 10, OverlongPenalty(buffer_tokens=4, factor=2.0))
    assert found.tolist() == [0.0, 0.0, -0.5, -1.0, -2.0]


def test_sums() -> None:
    assert sums(_numbers(1, 2, 3, 4), np.array([3, 1])).tolist() == [6.0, 4.0]
