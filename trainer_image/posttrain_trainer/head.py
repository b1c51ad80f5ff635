"""The head: from hidden states to log-probabilities of given tokens, without ever holding their logits.

Called by the scorer for every stage. Logits [n, V] are the largest tensor of a training step by far (4,096 tokens of a
vocabulary of 150,000: 2.4 GB, and several of them), and all that is wanted of them is three numbers per token. So they
are made a tile at a time, some tokens by some of the vocabulary, folded into running sums and forgotten; backward makes
each tile once more. The running sums are those of the online softmax (Milakov, Gimelshein 2018, arXiv:1805.02867),
with one more for the entropy.

Every product is in fp32 whatever the type of the weights, and gradients are rounded to that type once. torch only: it
knows no model, no DeepSpeed, no loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from posttrain_trainer.losses import Scores

TILE = 2**20
"""Logits of a tile (4 MiB in fp32), two of which are held at a time. Measured by benchmarks/head.py."""
ROW_TILES = 64
"""Tiles' worth of logits that `scores_by_rows` holds: it makes whole rows, and few at a time would be slow."""
LEAST = torch.finfo(torch.float32).min
"""Where a running maximum begins: minus infinity would make NaN of 0 · (−∞ − top)."""


@dataclass(frozen=True)
class LogitTransform:
    """What is done to the output of the head: cap · tanh(scale · x / cap) / temperature; without a cap scale · x /
    temperature.

    Cohere and Granite have a scale, Gemma has a cap. `temperature`: the one that tokens were sampled at.
    """

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        inner, outer = self.factors
        logits = logits if inner == 1.0 else logits * inner
        return logits if outer is None else outer * torch.tanh(logits)

    @property
    def factors(self) -> tuple[float, float | None]:
        """(a, b) of b · tanh(a · x), or (a, None) of a · x."""
        if self.cap is None:
            return self.scale / self.temperature, None
        return self.scale / self.cap, self.cap / self.temperature


def fused_scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
) -> Scores:
    """log p(target | hidden) of each token, fp32 [n], and without gradient the entropy (nats) and whether the target
    is the argmax (the first one where several are).

    hidden [n, H], weight [V, H], bias [V] or None, targets [n] within 0…V−1, else ValueError. n may be 0: the gradient
    is zero then, with a graph.
    """
    _check(targets, len(weight))
    scores: Scores = _Fused.apply(hidden, weight, bias, (targets, transform))
    return scores


def _check(targets: Tensor, vocabulary: int) -> None:
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise ValueError(
            f"targets are {int(targets.min())} to {int(targets.max())}, the head has {vocabulary} rows: "
            f"they must be within 0 to {vocabulary - 1}. Select the counted tokens before the head."
        )


def scores_by_rows(logits_of: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary: int) -> Scores:
    """The same for a head that is no plain product with a weight: slower, and it holds whole rows of logits,
    `ROW_TILES` tiles' worth of them, which backward makes once more.

    `logits_of`: hidden [m, H] → logits [m, V], transformed.
    """
    chunk = max(1, ROW_TILES * TILE // vocabulary)
    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    # With its random numbers: an adapter may have dropout.
    parts: list[Scores] = [checkpoint(_score_rows, logits_of, *pair, use_reentrant=False) for pair in pairs]
    logp, entropy, correct = (torch.cat(column) for column in zip(*parts, strict=True))
    return logp, entropy, correct


def _score_rows(logits_of: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Scores:
    log_probs = torch.log_softmax(logits_of(hidden).float(), dim=-1)
    logp = log_probs.gather(-1, targets[:, None])[:, 0]
    with torch.no_grad():
        detached = log_probs.detach()
        entropy = -(detached.exp() * detached).sum(-1)
        correct = (detached.argmax(-1) == targets).float()
    return logp, entropy, correct


class _Fused(torch.autograd.Function):
    """Forward keeps the hidden states, the targets and two numbers per token.

    Weight and bias are attributes of the context, not saved tensors: the parameter itself, which DeepSpeed empties
    after forward at ZeRO-3 and fills again before backward, and which hooks that move saved activations leave alone.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rest: tuple[Tensor, LogitTransform]
    ) -> Scores:
        targets, transform = rest
        sums = _Sums(targets)
        head = _Head(hidden, weight, bias, transform)
        for block in head.blocks():
            for tile in head.tiles(block):
                sums.add(tile)
        ctx.save_for_backward(hidden, targets, sums.top, sums.total)
        ctx.weight, ctx.bias, ctx.transform = weight, bias, transform
        scores = sums.scores()
        ctx.mark_non_differentiable(*scores[1:])
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        hidden, targets, top, total = ctx.saved_tensors
        head = _Head(hidden, ctx.weight, ctx.bias, ctx.transform)
        per_token = _PerToken(targets, top, -upstream / total, upstream)
        gradients = _Gradients(head, ctx.needs_input_grad[:3])
        for block in head.blocks():
            gradients.add(block, per_token)
        return *gradients.results(), None


@dataclass(frozen=True)
class _Block:
    """A slice of the vocabulary: weight [v, H] and bias [v] in fp32."""

    columns: slice
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class _Tile:
    """Logits [rows, columns] in a buffer that the next tile takes over, and a second such buffer: under a cap it
    holds the tanh, otherwise anything."""

    block: _Block
    rows: slice
    hidden: Tensor
    logits: Tensor
    spare: Tensor

    def find(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows have their target in this tile, and its column [rows, 1], 0 for the others."""
        places = targets[self.rows] - self.block.columns.start
        inside = (places >= 0) & (places < self.logits.shape[1])
        return inside, torch.where(inside, places, 0)[:, None]


class _Head:
    """The product in fp32, cut into tiles. The inner factor of the transform is in the hidden states."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> None:
        self.inner, self.outer = transform.factors
        self.given, self.weight, self.bias = hidden.dtype, weight.detach(), None if bias is None else bias.detach()
        self.hidden = hidden.detach().float() * self.inner if self.inner != 1.0 else hidden.detach().float()
        # Square: the fp32 copy of a slice of the weight stays small where there are few tokens.
        self.side = math.isqrt(TILE)
        self.buffers = self.hidden.new_empty(2, min(self.side, len(hidden)) * min(self.side, len(weight)))

    def blocks(self) -> Iterator[_Block]:
        """The vocabulary from the first to the last token."""
        for start in range(0, len(self.weight), self.side):
            columns = slice(start, min(start + self.side, len(self.weight)))
            bias = None if self.bias is None else self.bias[columns].float() * self.inner
            yield _Block(columns, self.weight[columns].float(), bias)

    def tiles(self, block: _Block) -> Iterator[_Tile]:
        """The tokens from the first to the last."""
        for start in range(0, len(self.hidden), self.side):
            yield self._tile(block, slice(start, min(start + self.side, len(self.hidden))))

    def _tile(self, block: _Block, rows: slice) -> _Tile:
        hidden = self.hidden[rows]
        shape = (len(hidden), len(block.weight))
        logits, spare = (buffer[: shape[0] * shape[1]].view(shape) for buffer in self.buffers)
        torch.mm(hidden, block.weight.T, out=logits)  # with `out` it is left alone by autocast, as addmm_ is
        if block.bias is not None:
            logits.add_(block.bias)
        if self.outer is not None:
            torch.mul(torch.tanh(logits, out=spare), self.outer, out=logits)
        return _Tile(block, rows, hidden, logits, spare)


class _Sums:
    """What is known of each token [n] over the part of the vocabulary seen so far: the largest logit and its place, the
    target's logit, Σ exp(x − top), and Σ exp(x − top)·(x − top) for the entropy."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets
        self.top = torch.full(targets.shape, LEAST, dtype=torch.float32, device=targets.device)
        self.total, self.moment, self.wanted = torch.zeros(3, *targets.shape, device=targets.device)
        self.best = torch.zeros_like(targets)

    def add(self, tile: _Tile) -> None:
        """Overwrites the tile."""
        rows, logits = tile.rows, tile.logits
        inside, places = tile.find(self.targets)
        self.wanted[rows] = torch.where(inside, logits.gather(1, places)[:, 0], self.wanted[rows])
        highest, where = logits.max(-1)
        # strictly: of equal ones the first stays
        self.best[rows] = torch.where(highest > self.top[rows], where + tile.block.columns.start, self.best[rows])
        self._fold(rows, torch.maximum(self.top[rows], highest), tile)

    def _fold(self, rows: slice, top: Tensor, tile: _Tile) -> None:
        shift = self.top[rows] - top
        kept = self.total[rows] * shift.exp()
        below = tile.logits.sub_(top[:, None])
        powers = torch.exp(below, out=tile.spare)
        self.moment[rows] = self.moment[rows] * shift.exp() + kept * shift
        self.total[rows] = kept + powers.sum(-1)
        self.moment[rows] += powers.mul_(below).sum(-1)
        self.top[rows] = top

    def scores(self) -> Scores:
        """log p = x − top − log Σ; the entropy log Σ − Σ exp(x − top)(x − top) / Σ. The differences come first: `top`
        may be large, and adding the logarithm to it would round it away."""
        log_total = self.total.log()
        entropy = log_total - self.moment / self.total
        return self.wanted - self.top - log_total, entropy, (self.best == self.targets).float()


@dataclass(frozen=True)
class _PerToken:
    """What backward needs of each token [n]: with p = exp(x − top) / total the gradient of the logits is
    upstream · (1[target] − p), and `scale` is −upstream / total."""

    targets: Tensor
    top: Tensor
    scale: Tensor
    upstream: Tensor

    def logit_gradient(self, tile: _Tile, outer: float | None) -> Tensor:
        """Of the product [rows, columns], before cap and outer factor. Overwrites the tile."""
        rows, logits = tile.rows, tile.logits
        gradient = logits.sub_(self.top[rows, None]).exp_().mul_(self.scale[rows, None])
        inside, places = tile.find(self.targets)
        gradient.scatter_add_(1, places, torch.where(inside, self.upstream[rows], 0.0)[:, None])
        if outer is not None:
            # d(outer · tanh(x)) / dx
            gradient.mul_(tile.spare.square_().neg_().add_(1.0).mul_(outer))
        return gradient


class _Gradients:
    """Sums in fp32 over tiles; None where nobody asks. Those of weight and bias are rounded to the weight's type a
    block at a time, so that no second copy of the weight's size is made."""

    def __init__(self, head: _Head, wanted: Sequence[bool]) -> None:
        self._head = head
        self.hidden = torch.zeros_like(head.hidden) if wanted[0] else None
        self.weight = torch.empty_like(head.weight) if wanted[1] else None
        self.bias = torch.empty_like(head.bias) if head.bias is not None and wanted[2] else None

    def add(self, block: _Block, per_token: _PerToken) -> None:
        """All tokens of one block of the vocabulary."""
        weight = torch.zeros_like(block.weight) if self.weight is not None else None
        bias = torch.zeros_like(block.bias) if self.bias is not None and block.bias is not None else None
        for tile in self._head.tiles(block):
            gradient = per_token.logit_gradient(tile, self._head.outer)
            if self.hidden is not None:
                self.hidden[tile.rows].addmm_(gradient, block.weight)
            if weight is not None:
                weight.addmm_(gradient.T, tile.hidden)
            if bias is not None:
                bias.add_(gradient.sum(0))
        if self.weight is not None and weight is not None:
            self.weight[block.columns] = weight
        if self.bias is not None and bias is not None:
            self.bias[block.columns] = bias.mul_(self._head.inner)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias, in their types."""
        hidden = None if self.hidden is None else self.hidden.mul_(self._head.inner).to(self._head.given)
        return hidden, self.weight, self.bias
