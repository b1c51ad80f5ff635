"""Estimators of the divergence KL(π ‖ ref) from the tokens that π sampled. torch only; called by the algorithms.

All take d = log π(token) − log ref(token) and return one number per token. Their place decides what they mean
(Schulman 2020, "Approximating KL divergence"; Tang, Munos 2025, arXiv:2506.09477). Subtracted from a reward, without
gradient: k1 is what policy gradients of the penalised reward need; k2 and k3 penalise something else. As a term of the
loss, with gradient: ∇k1 vanishes in expectation, ∇k2 is ∇KL(π ‖ ref), ∇k3 is ∇KL(ref ‖ π). Nothing is clamped: a
reference that finds a token e³⁰ times as probable makes k3 explode, and that must be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def k1(difference: Tensor) -> Tensor:
    """d: unbiased, of any sign, of high variance."""
    return difference


def k2(difference: Tensor) -> Tensor:
    """d²/2: never negative, biased where π is far from the reference."""
    return difference**2 / 2


def k3(difference: Tensor) -> Tensor:
    """exp(−d) − 1 + d: unbiased, never negative. Through expm1: for a small d the 1 would eat what is left of it."""
    return torch.expm1(-difference) + difference


ESTIMATORS: Mapping[str, Callable[[Tensor], Tensor]] = {"K1": k1, "K2": k2, "K3": k3}
