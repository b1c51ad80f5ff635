"""Losses of a policy and of its critic, one number per token or sequence. torch only; called by the online algorithms.

Pure functions without a sum, a mean or a weight: how tokens add up is `aggregation`'s matter, and the division by N is
the loop's. A ratio is π(token)/π_old(token), with gradient; an advantage, a return and a correction have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TIS_MOST = 3.0
"""Truncated importance sampling: TRL's vllm_importance_sampling_clip_max. Yao et al. 2025, "Your efficient RL
framework secretly brings you off-policy training", truncate at 2."""
ICEPOP_LEAST, ICEPOP_MOST = 0.5, 5.0
"""α and β of IcePop (Ling Team 2025, arXiv:2510.18855) as OpenRLHF has them. TRL's `token_mask` has no lower bound of
its own."""
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Clip:
    """How far a ratio may go. low, high: [1 − low, 1 + high]; dual: where a ratio counts no further though the
    advantage is negative, above 1 + high; None: nowhere."""

    low: float
    high: float
    dual: float | None = None


def ratio_of(difference: Tensor) -> Tensor:
    """ρ = exp(log π − log π_old), with the logarithm kept within ±LARGEST_LOG_RATIO, as OpenRLHF does: beyond 88 exp is
    infinite in fp32, and infinity times 0, which is what a clipped token's gradient is, is no number."""
    return difference.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def clipped(ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """−min(min(ρ, dual)·A, clip(ρ, 1 − low, 1 + high)·A).

    Schulman et al. 2017 (arXiv:1707.06347), equation 7; low ≠ high: DAPO (arXiv:2503.14476), equation 10; dual: Ye et
    al. 2020 (arXiv:1912.09729), equation 7, written as TRL's `delta` is: the same for every dual > 1 + high.
    """
    inside = ratio.clamp(1 - clip.low, 1 + clip.high)
    capped = ratio if clip.dual is None else ratio.clamp(max=clip.dual)
    return -torch.minimum(capped * advantage, inside * advantage)


def below(ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """1 where the lower bound has stopped a token: ρ < 1 − low and A < 0."""
    return ((ratio < 1 - clip.low) & (advantage < 0)).float()


def above(ratio: Tensor, advantage: Tensor, clip: Clip) -> Tensor:
    """1 where the upper bound has stopped a token: ρ > 1 + high and A > 0."""
    return ((ratio > 1 + clip.high) & (advantage > 0)).float()


def value_loss(value: Tensor, before: Tensor, target: Tensor, clip: float) -> Tensor:
    """½·max((V − R)², (clip(V, V_before ± clip) − R)²): OpenAI baselines' PPO2, as in TRL. Schulman et al. 2017 do not
    clip."""
    return torch.maximum((value - target) ** 2, (_near(value, before, clip) - target) ** 2) / 2


def value_clipped(value: Tensor, before: Tensor, target: Tensor, clip: float) -> Tensor:
    """1 where the clipped value is what counts, and so nothing is learned."""
    return ((_near(value, before, clip) - target) ** 2 > (value - target) ** 2).float()


def _near(value: Tensor, before: Tensor, clip: float) -> Tensor:
    return torch.minimum(torch.maximum(value, before - clip), before + clip)


def truncated(difference: Tensor) -> Tensor:
    """TIS: min(exp(d), TIS_MOST), d = log π_old − log p of the engine that sampled the token."""
    return difference.exp().clamp(max=TIS_MOST)


def within(difference: Tensor) -> Tensor:
    """IcePop: exp(d), and 0 outside [ICEPOP_LEAST, ICEPOP_MOST]: such a token teaches nothing."""
    weight = ratio_of(difference)
    return weight * ((weight >= ICEPOP_LEAST) & (weight <= ICEPOP_MOST))
