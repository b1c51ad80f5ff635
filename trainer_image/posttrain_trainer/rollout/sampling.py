"""One token from each row of logits: what both rollout engines call, so that they draw the same from the same logits.

torch only; the random numbers are noise.py's. The log-probability that is kept is the trainer's own kind: under
logits/temperature, before top_k and top_p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain_trainer.rollout.base import Sampling
from posttrain_trainer.rollout.noise import gumbel, keys_of

TILE = {"cpu": 2**19, "cuda": 2**24}
"""Logits that noise is made for at a time. On a CPU its buffers stay in the cache, which is seven times as fast at a
vocabulary of 150,000; on an accelerator they are three of 64 to 128 MiB."""


def draw(logits: Tensor, seeds: Sequence[int], indices: Sequence[int], sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits [n, V]; row i is for token `indices[i]` of the sample with `seeds[i]` → tokens int64 [n], log p fp32
    [n]. NaN in a row gives NaN."""
    rows = max(1, TILE[logits.device.type] // logits.shape[1])
    keys = keys_of(seeds, indices, logits.device)
    parts = [_draw(*pair, sampling) for pair in zip(logits.split(rows), keys.split(rows), strict=True)]
    tokens, logp = (torch.cat(column) for column in zip(*parts, strict=True))
    return tokens, logp


def _draw(logits: Tensor, keys: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    scores = logits.float() / sampling.temperature
    values, tokens = candidates(scores, sampling)
    place = (values + gumbel(keys, tokens)).argmax(-1, keepdim=True)
    chosen = place if tokens.ndim == 1 else tokens.gather(1, place)
    logp = scores.gather(1, chosen)[:, 0] - scores.logsumexp(-1)
    return chosen[:, 0], logp


def candidates(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """scores [n, V] → those that may be drawn [n, c], −inf where not, and their tokens, [n, c] or for all [V]."""
    vocabulary = scores.shape[1]
    if sampling.top_k == 1:
        return scores.max(-1, keepdim=True)
    if 0 < sampling.top_k < vocabulary:
        values, tokens = scores.topk(sampling.top_k)
    elif sampling.top_p < 1.0:
        values, tokens = scores.sort(descending=True, stable=True)
    else:
        return scores, torch.arange(vocabulary, device=scores.device)
    if sampling.top_p < 1.0:
        probabilities = values.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        before[:, 0] = -1.0  # the first stays, whatever top_p is
        values = values.masked_fill(before >= sampling.top_p, -torch.inf)
    return values, tokens
