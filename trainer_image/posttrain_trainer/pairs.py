"""Pairs of answers in a micro-batch: sequences alternate, chosen, rejected. Called by algorithms that have pairs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from posttrain_trainer.microbatch import MicroBatch


def split(each: Tensor) -> tuple[Tensor, Tensor]:
    """[s] → chosen [r], rejected [r]."""
    chosen, rejected = each.view(-1, 2).unbind(1)
    return chosen, rejected


def chosen_tokens(micro: MicroBatch) -> Tensor:
    """The counted tokens' weights [n], 0 in rejected answers."""
    return micro.weights * (micro.sequence % 2 == 0)


def means(by_pair: Mapping[str, Tensor], micro: MicroBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """Metric → [r], as sums over pairs with their number; a dummy counts nothing."""
    return {name: ((each * micro.rows).sum(), micro.rows.sum()) for name, each in by_pair.items()}
