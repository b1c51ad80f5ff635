"""How numbers of tokens add up to a loss: by token, by sequence, or over a constant. Called by the online algorithms.

Each way is a sum and its weight, and the loop divides one by the other over all micro-batches and ranks of the update,
so a way is the same however samples are cut. `counted` [n] says which tokens take part: 0 in dummies and in completions
that are masked; such a completion leaves the tokens' number, and stays among the sequences, as in TRL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from posttrain_trainer.microbatch import MicroBatch


@dataclass(frozen=True)
class Aggregation:
    """Token: Σ over tokens / tokens (DAPO). Sequence: the mean over sequences of the mean over their tokens (1/|o|,
    GRPO, PPO). Constant: Σ over tokens / (sequences · most), most being maxNewTokens (Dr. GRPO, arXiv:2503.20783)."""

    kind: Literal["Token", "Sequence", "Constant"]
    most: int = 1

    def weight(self, micro: MicroBatch, counted: Tensor) -> float:
        """The micro-batch's part of what the sum is divided by."""
        if self.kind == "Token":
            return float(counted.sum())
        return float(micro.rows.sum()) * (self.most if self.kind == "Constant" else 1)

    def total(self, each: Tensor, micro: MicroBatch, counted: Tensor) -> Tensor:
        """The micro-batch's sum. each: [n], with gradient."""
        if self.kind == "Sequence":
            return means(each, micro, counted).sum()
        return (each * counted).sum()


def means(each: Tensor, micro: MicroBatch, counted: Tensor) -> Tensor:
    """Mean over each sequence's counted tokens, fp32 [s]; 0 where none is."""
    return micro.by_sequence(each * counted) / micro.by_sequence(counted).clamp(min=1.0)
