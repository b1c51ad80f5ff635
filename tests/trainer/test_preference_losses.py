"""The losses of pairs and of a reward model, each computed by hand; gradients too."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain_trainer.preference_losses import apo_down, apo_zero, dpo, hinge, ipo, robust_dpo, simpo
from posttrain_trainer.reward_losses import bradley_terry, centering

LN3 = math.log(3)  # σ(ln 3) = 3/4, σ(−ln 3) = 1/4, σ(2·ln 3) = 9/10
Loss = Callable[[Tensor, Tensor], Tensor]


def _value_and_gradient(loss: Loss, chosen: float, rejected: float) -> tuple[float, float, float]:
    given = [torch.tensor([each], requires_grad=True) for each in (chosen, rejected)]
    value = loss(*given)
    assert value.shape == (1,)
    assert value.dtype == torch.float32
    by_chosen, by_rejected = torch.autograd.grad(value.sum(), given)
    return float(value.detach()), float(by_chosen), float(by_rejected)


# β = ½ except where it is said. Columns: loss, a_c, a_r, value, ∂/∂a_c, ∂/∂a_r.
BY_HAND = [
    # βΔ = ln 3: −log ¾ = 0.28768207; ∂ = −β·(1 − ¾) = −⅛
    pytest.param(lambda c, r: dpo(c, r, 0.5), 2 * LN3, 0.0, 0.28768207, -0.125, 0.125, id="DPO"),
    # ¾·0.28768207 + ¼·1.38629436 = 0.56233514; ∂ = β·(σ − (1 − ε)) = ½·(¾ − ¾) = 0
    pytest.param(lambda c, r: dpo(c, r, 0.5, 0.25), 2 * LN3, 0.0, 0.56233514, 0.0, 0.0, id="cDPO"),
    # (¾·0.28768207 − ¼·1.38629436)/½ = −0.26162407; ∂ = β·[−¾·¼ − ¼·¾]/½ = −0.375
    pytest.param(lambda c, r: robust_dpo(c, r, 0.5, 0.25), 2 * LN3, 0.0, -0.26162407, -0.375, 0.375, id="RobustDPO"),
    # (0.9 − 0.4 − 1/(2·½))² = 0.25; ∂ = 2·(−½) = −1
    pytest.param(lambda c, r: ipo(c, r, 0.5), 0.9, 0.4, 0.25, -1.0, 1.0, id="IPO"),
    # 1 − ½·(1.5 − 1) = 0.75; ∂ = −½
    pytest.param(lambda c, r: hinge(c, r, 0.5), 1.5, 1.0, 0.75, -0.5, 0.5, id="Hinge"),
    # 1 − ½·3 < 0
    pytest.param(lambda c, r: hinge(c, r, 0.5), 4.0, 1.0, 0.0, 0.0, 0.0, id="Hinge beyond its margin"),
    # βa_c = ln 3, βa_r = −ln 3: (1 − ¾) + ¼ = ½; ∂ = ∓½·¾·¼ = ∓0.09375
    pytest.param(lambda c, r: apo_zero(c, r, 0.5), 2 * LN3, -2 * LN3, 0.5, -0.09375, 0.09375, id="APOZero"),
    # ¾ + (1 − 9/10) = 0.85; ∂a_c = ½·(¾·¼ − 9/10·1/10) = 0.04875, ∂a_r = ½·0.09 = 0.045
    pytest.param(lambda c, r: apo_down(c, r, 0.5), 2 * LN3, -2 * LN3, 0.85, 0.04875, 0.045, id="APODown"),
    # β = 2, γ = 2·½ = 1: 2·(−0.5 + 1.5) − 1 = 1, log(1 + e⁻¹) = 0.31326169; ∂ = −2·σ(−1) = −0.53788284
    pytest.param(lambda c, r: simpo(c, r, 2.0, 0.5), -0.5, -1.5, 0.31326169, -0.53788284, 0.53788284, id="SimPO"),
    # r_c − r_r − m = ln 3: 0.28768207; ∂ = −¼
    pytest.param(
        lambda c, r: bradley_terry(c, r, torch.tensor([1.0])), 1.5 + LN3, 0.5, 0.28768207, -0.25, 0.25, id="margin"
    ),
    # (1.5 − 0.5)² = 1; ∂ = 2 to both
    pytest.param(centering, 1.5, -0.5, 1.0, 2.0, 2.0, id="centering"),
]


@pytest.mark.parametrize(("loss", "chosen", "rejected", "value", "by_chosen", "by_rejected"), BY_HAND)
def test_by_hand(
    loss: Loss, chosen: float, rejected: float, value: float, by_chosen: float, by_rejected: float
) -> None:
    found = _value_and_gradient(loss, chosen, rejected)
    assert found == pytest.approx((value, by_chosen, by_rejected), rel=1e-6, abs=1e-7)


def test_the_label_is_smoothed_between_its_limits() -> None:
    chosen, rejected = torch.tensor([1.5, -4.0]), torch.tensor([0.5, 2.0])
    plain = dpo(chosen, rejected, 0.3)
    torch.testing.assert_close(dpo(chosen, rejected, 0.3, 0.0), plain, rtol=0, atol=0)
    torch.testing.assert_close(robust_dpo(chosen, rejected, 0.3, 0.0), plain, rtol=0, atol=0)
    # ε = 1: every label is the other way round. ε = ½: nothing is known, and Δ = 0 is best.
    torch.testing.assert_close(dpo(chosen, rejected, 0.3, 1.0), dpo(rejected, chosen, 0.3))
    torch.testing.assert_close(dpo(chosen, rejected, 0.3, 0.5), dpo(rejected, chosen, 0.3, 0.5))
    assert _value_and_gradient(lambda c, r: dpo(c, r, 0.3, 0.5), 2.0, 2.0)[1] == 0.0


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_robust_dpo_expects_the_clean_loss(smoothing: float) -> None:
    """(1 − ε)·loss(as labelled) + ε·loss(flipped) is DPO on the true label: that is what it was made for."""
    chosen, rejected = torch.tensor([1.5, -4.0, 0.0]), torch.tensor([0.5, 2.0, 0.0])
    labelled = robust_dpo(chosen, rejected, 0.5, smoothing)
    flipped = robust_dpo(rejected, chosen, 0.5, smoothing)
    expected = (1 - smoothing) * labelled + smoothing * flipped
    torch.testing.assert_close(expected, dpo(chosen, rejected, 0.5), rtol=1e-5, atol=1e-6)


EXTREME = [
    # at βΔ = −10 000 the slope is −β, at +10 000 nothing is left
    pytest.param(lambda c, r: dpo(c, r, 1.0), (1e4, -1.0), (0.0, 0.0), id="DPO"),
    pytest.param(lambda c, r: robust_dpo(c, r, 1.0, 0.0), (1e4, -1.0), (0.0, 0.0), id="RobustDPO"),
    pytest.param(lambda c, r: hinge(c, r, 1.0), (1e4 + 1, -1.0), (0.0, 0.0), id="Hinge"),
    pytest.param(lambda c, r: apo_zero(c, r, 1.0), (1.5, 0.0), (0.5, 0.0), id="APOZero"),
    pytest.param(lambda c, r: apo_down(c, r, 1.0), (1.0, 0.0), (1.0, 0.0), id="APODown"),
    pytest.param(lambda c, r: simpo(c, r, 1.0, 0.0), (1e4, -1.0), (0.0, 0.0), id="SimPO"),
    pytest.param(lambda c, r: bradley_terry(c, r, torch.zeros(1)), (1e4, -1.0), (0.0, 0.0), id="reward"),
]


@pytest.mark.parametrize(("loss", "low", "high"), EXTREME)
def test_large_differences_stay_finite(loss: Loss, low: tuple[float, float], high: tuple[float, float]) -> None:
    assert _value_and_gradient(loss, -1e4, 0.0)[:2] == pytest.approx(low, abs=1e-6)
    assert _value_and_gradient(loss, 1e4, 0.0)[:2] == pytest.approx(high, abs=1e-6)
