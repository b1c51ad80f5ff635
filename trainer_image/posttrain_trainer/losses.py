"""Log-probabilities of tokens and the losses made of them. torch only; called by the model's head and by algorithms.

Every loss is a *sum* over tokens with weights; the loop divides it once by the weight of the whole step over all
ranks. A mean in here would make the result depend on how rows are cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**26
"""Logits held at a time (256 MiB in fp32): more tokens are scored in chunks that are computed again in backward."""

Scores = tuple[Tensor, Tensor, Tensor]


def token_scores(project: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk: int) -> Scores:
    """log p(target | hidden) of each token, fp32 [n], and without gradient the entropy (nats) and whether argmax hits.

    `project`: hidden [m, H] → logits [m, V]. Only counted positions come in here, so no logit is computed in vain;
    at most `chunk` rows of logits are held.
    """
    if len(targets) <= chunk:
        return _score(project, hidden, targets)
    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    parts = [_recomputed(project, rows, wanted) for rows, wanted in pairs]
    logp, entropy, correct = (torch.cat(column) for column in zip(*parts, strict=True))
    return logp, entropy, correct


def _recomputed(project: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Scores:
    # The head draws no random numbers, so the generator need not be saved.
    scores: Scores = checkpoint(_score, project, hidden, targets, use_reentrant=False, preserve_rng_state=False)
    return scores


def _score(project: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Scores:
    log_probs = torch.log_softmax(project(hidden).float(), dim=-1)
    logp = log_probs.gather(-1, targets[:, None])[:, 0]
    with torch.no_grad():
        detached = log_probs.detach()
        entropy = -(detached.exp() * detached).sum(-1)
        correct = (detached.argmax(-1) == targets).float()
    return logp, entropy, correct


def nll_sum(logp: Tensor, weights: Tensor) -> Tensor:
    """−Σ w·log p, fp32: cross-entropy before the division by N = Σ w over all micro-batches and ranks of the step."""
    return -(weights * logp.float()).sum()
