"""Losses of policy and critic, KL estimators and ways to add tokens up, each computed by hand; gradients too."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain_trainer.aggregation import Aggregation, means
from posttrain_trainer.kl import ESTIMATORS, k1, k2, k3
from posttrain_trainer.microbatch import MicroBatch, collate, dummy
from posttrain_trainer.policy_losses import (
    Clip,
    above,
    below,
    clipped,
    ratio_of,
    truncated,
    value_clipped,
    value_loss,
    within,
)
from posttrain_trainer.tokenset import Example, TrainingRow

PLAIN, DUAL = Clip(0.2, 0.3), Clip(0.2, 0.3, 3.0)
LN2 = math.log(2)


def _with_gradient(of: Callable[[Tensor], Tensor], at: float) -> tuple[float, float]:
    given = torch.tensor([at], requires_grad=True)
    value = of(given)
    assert value.shape == (1,)
    (gradient,) = torch.autograd.grad(value.sum(), given)
    return float(value.detach()), float(gradient)


# Clip to [0.8, 1.3]. Columns: ratio, advantage, loss, ∂/∂ratio.
CLIPPED = [
    pytest.param(PLAIN, 1.1, 2.0, -2.2, -2.0, id="inside"),
    pytest.param(PLAIN, 1.5, 2.0, -2.6, 0.0, id="better, and far enough"),
    pytest.param(PLAIN, 0.5, 2.0, -1.0, -2.0, id="better, and has become rarer: pulled back"),
    pytest.param(PLAIN, 0.5, -2.0, 1.6, 0.0, id="worse, and far enough"),
    pytest.param(PLAIN, 1.5, -2.0, 3.0, 2.0, id="worse, and has become more frequent: pulled back"),
    pytest.param(PLAIN, 4.0, -2.0, 8.0, 2.0, id="worse, without a bound"),
    pytest.param(DUAL, 4.0, -2.0, 6.0, 0.0, id="worse, beyond the dual clip"),
    pytest.param(DUAL, 2.0, -2.0, 4.0, 2.0, id="worse, before it"),
    pytest.param(DUAL, 4.0, 2.0, -2.6, 0.0, id="better, beyond the dual clip"),
    pytest.param(PLAIN, 1.0, 0.0, 0.0, 0.0, id="nothing to learn"),
]


@pytest.mark.parametrize(("clip", "ratio", "advantage", "loss", "gradient"), CLIPPED)
def test_clipped(clip: Clip, ratio: float, advantage: float, loss: float, gradient: float) -> None:
    found = _with_gradient(lambda given: clipped(given, torch.tensor([advantage]), clip), ratio)
    assert found == pytest.approx((loss, gradient), rel=1e-6, abs=1e-7)


def test_what_counts_as_clipped_is_what_has_no_gradient() -> None:
    """Without a dual clip and except for an advantage of 0."""
    ratio = torch.linspace(0.3, 2.0, 18).repeat(2).requires_grad_()
    advantage = torch.cat([torch.full((18,), 1.5), torch.full((18,), -0.5)])
    (gradient,) = torch.autograd.grad(clipped(ratio, advantage, PLAIN).sum(), ratio)
    stopped = below(ratio, advantage, PLAIN) + above(ratio, advantage, PLAIN)
    assert torch.equal(stopped > 0, gradient == 0)
    assert float(below(ratio, advantage, PLAIN).sum()) > 3
    assert float(above(ratio, advantage, PLAIN).sum()) > 3


# Before 1.0, clip 0.2. Columns: value, target, loss, ∂/∂value, clipped.
VALUES = [
    pytest.param(1.1, 2.0, 0.405, -0.9, 0.0, id="near"),
    pytest.param(1.5, 2.0, 0.32, 0.0, 1.0, id="towards the target, and far enough"),
    pytest.param(0.5, 2.0, 1.125, -1.5, 0.0, id="away from it: pulled back"),
    pytest.param(1.5, 1.0, 0.125, 0.5, 0.0, id="beyond it: pulled back"),
]


@pytest.mark.parametrize(("value", "target", "loss", "gradient", "stopped"), VALUES)
def test_value_loss(value: float, target: float, loss: float, gradient: float, stopped: float) -> None:
    before, aim = torch.tensor([1.0]), torch.tensor([target])
    found = _with_gradient(lambda given: value_loss(given, before, aim, 0.2), value)
    assert found == pytest.approx((loss, gradient), rel=1e-6, abs=1e-7)
    assert float(value_clipped(torch.tensor([value]), before, aim, 0.2)) == stopped


def test_corrections() -> None:
    difference = torch.tensor([0.4, 0.6, 1.0, 2.0, 4.9, 6.0]).log()
    torch.testing.assert_close(truncated(difference), torch.tensor([0.4, 0.6, 1.0, 2.0, 3.0, 3.0]))
    torch.testing.assert_close(within(difference), torch.tensor([0.0, 0.6, 1.0, 2.0, 4.9, 0.0]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("K1", (LN2, -LN2)), ("K2", (0.24022651, 0.24022651)), ("K3", (0.19314718, 0.30685282))],
)
def test_kl_estimators(name: str, expected: tuple[float, float]) -> None:
    """d = ±ln 2: k3 = ½ − 1 + ln 2, and 2 − 1 − ln 2."""
    found = ESTIMATORS[name](torch.tensor([LN2, -LN2]))
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_k3_keeps_its_digits() -> None:
    """d²/2 is all that is left of it near 0; exp(−d) − 1 + d in fp32 would be 0 or twice as much."""
    found = k3(torch.tensor([1e-3, -1e-3]))
    torch.testing.assert_close(found, torch.full((2,), 5e-7), rtol=1e-3, atol=0)


def _distributions() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(7, dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64).log_softmax(-1)


def test_k1_and_k3_expect_the_divergence() -> None:
    logits, reference = _distributions()
    logp = logits.log_softmax(-1).detach()
    divergence = (logp.exp() * (logp - reference)).sum()
    for estimator in (k1, k3):
        torch.testing.assert_close((logp.exp() * estimator(logp - reference)).sum(), divergence)
    assert abs(float((logp.exp() * k2(logp - reference)).sum() - divergence)) > 0.01


def test_gradients_of_the_estimators() -> None:
    """Expected over samples of π: k1's is 0, k2's that of KL(π ‖ ref), k3's that of KL(ref ‖ π)."""
    logits, reference = _distributions()
    logp = logits.log_softmax(-1)

    def gradient(of: Tensor) -> Tensor:
        return torch.autograd.grad(of, logits, retain_graph=True)[0]

    sampled = logp.exp().detach()
    forward, backward = (reference.exp() * (reference - logp)).sum(), (logp.exp() * (logp - reference)).sum()
    expected = {k1: torch.zeros(7, dtype=torch.float64), k2: gradient(backward), k3: gradient(forward)}
    for estimator, wanted in expected.items():
        torch.testing.assert_close(gradient((sampled * estimator(logp - reference)).sum()), wanted)
    assert float((expected[k2] - expected[k3]).norm()) > 0.1


def _micro(*sizes: int) -> MicroBatch:
    rows = []
    for size in sizes:
        mask = np.array([0, 0] + [1] * size, dtype=np.uint8)
        rows.append(TrainingRow((Example(np.arange(2 + size, dtype=np.int32), mask),), {}))
    return collate(rows)


# Tokens of three sequences: (1, 3), (5), (2, 4, 6).
AGGREGATED = [
    pytest.param(Aggregation("Token"), [1] * 6, 21 / 6, id="by token"),
    pytest.param(Aggregation("Sequence"), [1] * 6, (2 + 5 + 4) / 3, id="by sequence"),
    pytest.param(Aggregation("Constant", 10), [1] * 6, 21 / 30, id="by a constant"),
    pytest.param(Aggregation("Token"), [1, 1, 1, 0, 0, 0], 9 / 3, id="masked, by token: not among them"),
    pytest.param(Aggregation("Sequence"), [1, 1, 1, 0, 0, 0], (2 + 5 + 0) / 3, id="masked, by sequence: among them"),
    pytest.param(Aggregation("Constant", 10), [1, 1, 1, 0, 0, 0], 9 / 30, id="masked, by a constant: among them"),
]


@pytest.mark.parametrize(("way", "counted", "mean"), AGGREGATED)
def test_aggregations(way: Aggregation, counted: list[int], mean: float) -> None:
    micro, each = _micro(2, 1, 3), torch.tensor([1.0, 3.0, 5.0, 2.0, 4.0, 6.0])
    found = way.total(each, micro, torch.tensor(counted).float()) / way.weight(micro, torch.tensor(counted).float())
    assert float(found) == pytest.approx(mean)


@pytest.mark.parametrize("way", [Aggregation("Token"), Aggregation("Sequence"), Aggregation("Constant", 10)])
def test_a_dummy_is_nothing_with_a_graph(way: Aggregation) -> None:
    micro = dummy(TrainingRow((Example(np.arange(4, dtype=np.int32), np.array([0, 0, 1, 1], dtype=np.uint8)),), {}))
    each = torch.tensor([7.0], requires_grad=True)
    found = way.total(each, micro, micro.weights)
    (gradient,) = torch.autograd.grad(found, each)
    assert (way.weight(micro, micro.weights), float(found.detach()), float(gradient)) == (0.0, 0.0, 0.0)


def test_means_by_sequence() -> None:
    each = torch.tensor([1.0, 3.0, 5.0, 2.0, 4.0, 6.0])
    found = means(each, _micro(2, 1, 3), torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]))
    assert found.tolist() == [1.0, 0.0, 3.0]


def test_a_ratio_that_would_overflow_teaches_nothing() -> None:
    difference = torch.tensor([100.0, 100.0, -100.0, 0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss = clipped(ratio_of(difference), advantage, Clip(0.2, 0.2))
    assert bool(torch.isfinite(loss).all())
    loss.sum().backward()
    assert difference.grad is not None
    assert difference.grad[:3].tolist() == [0.0, 0.0, 0.0]
    assert float(difference.grad[3]) == pytest.approx(math.exp(0.5), rel=1e-6)
    assert within(torch.tensor([100.0])).tolist() == [0.0]
