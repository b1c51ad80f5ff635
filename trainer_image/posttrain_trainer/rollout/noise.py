"""The random numbers of sampling: a function of a sample's seed, the token's index and the vocabulary, and of nothing
else.

Called by sampling.py for both engines. A generator's state would make a sample depend on what is drawn beside it; here
the number for token v is output v of splitmix64 (Steele, Lea, Flood 2014) begun at a state of (seed, index). It is
integer arithmetic, so a CPU and an accelerator draw the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain_trainer.rollout.base import seed_of

_STEP = -7046029254386353131  # 0x9E3779B97F4A7C15 as torch has it: 64 bits with a sign
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB
_LAST = 18.0
"""The largest exponential number: a share of 3e-8 above 16.6 would be infinite in fp32, and never win alone either."""


def keys_of(seeds: Sequence[int], indices: Sequence[int], device: torch.device) -> Tensor:
    """int64 [n]: where the numbers of token `index` of the sample with `seed` begin."""
    keys = [_signed(seed_of(seed, index)) for seed, index in zip(seeds, indices, strict=True)]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel numbers, fp32 [n, v]. keys int64 [n], tokens int64 [n, v] or [v]: argmax(log p + gumbel) is a
    draw from p (Gumbel 1954), and rarely another one where p differs in its last digits."""
    x = keys[:, None] + (tokens + 1) * _STEP
    x.bitwise_xor_(_shifted(x, 30)).mul_(_FIRST)
    x.bitwise_xor_(_shifted(x, 27)).mul_(_SECOND)
    x.bitwise_xor_(_shifted(x, 31)).bitwise_and_(2**63 - 1)
    # Uniform with all its digits near 0, which is where the winner's exponential number lies.
    uniform = x.float().mul_(2.0**-63).clamp_(min=2.0**-64)
    exponential = uniform.neg_().log1p_().neg_().clamp_(max=_LAST)
    return exponential.log_().neg_()


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right; torch's own repeats the sign."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
