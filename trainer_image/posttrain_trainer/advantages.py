"""From the rewards of a rollout to the advantages of its tokens. numpy only, pure; called by the online algorithms'
`estimate`, and by the collector for what it reports of groups.

Everything is over the whole rollout, which is the same on every rank, so no result depends on how many there are. A
reward that is NaN was skipped: it is in no baseline and no statistic, and its advantage is 0. Computed in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from posttrain_api.online import AdaptiveKL, OverlongPenalty

ADVANTAGE, RETURN = "advantage", "return"
"""Of each token, among a micro-batch's `each`: what an update needs of `estimate`."""
Numbers = NDArray[np.float64]
WHITENING_EPSILON = 1e-8
"""Added to the variance; TRL's."""
NORMALIZING_EPSILON = 1e-4
"""Added to the standard deviation; TRL's, of RLOO."""
EQUAL = 1e-8
"""Rewards that differ by less have no variance: torch.isclose's tolerance, as in TRL's frac_reward_zero_std."""
LARGEST_ERROR = 0.2
"""Of the adaptive KL's proportional error: Ziegler et al. 2019 (arXiv:1909.08593), §2.2."""


def gae(
    rewards: Numbers, values: Numbers, sizes: NDArray[np.int64], gamma: float, lam: float
) -> tuple[Numbers, Numbers]:
    """Generalised advantage estimation by sample, and returns: A_t = δ_t + γλ·A_{t+1}, δ_t = r_t + γ·V_{t+1} − V_t,
    R_t = A_t + V_t. After the last token V and A are 0.

    rewards, values: flat, [Σ sizes]. Schulman et al. 2016 (arXiv:1506.02438), equation 16. All samples go backwards
    together; the zeros after a short one's end leave it as if it were alone.
    """
    real = np.arange(sizes.max(initial=0)) < sizes[:, None]
    reward, value = _table(rewards, real), _table(values, real)
    advantage = np.zeros_like(value)
    after, ahead = np.zeros(len(sizes)), np.zeros(len(sizes))
    for token in reversed(range(real.shape[1])):
        after = reward[:, token] + gamma * ahead - value[:, token] + gamma * lam * after
        advantage[:, token], ahead = after, value[:, token]
    return advantage[real], (advantage + value)[real]


def _table(flat: Numbers, real: NDArray[np.bool_]) -> Numbers:
    table = np.zeros(real.shape)
    table[real] = flat
    return table


def whitened(values: Numbers, counted: NDArray[np.bool_]) -> Numbers:
    """(x − mean)/√(variance + 1e-8) over all counted tokens of the rollout; 0 elsewhere.

    The variance divides by n − 1, as TRL's masked_whiten does, so that one rank's numbers are TRL's; over ranks TRL
    has a mean for each. One token alone has no variance: 0.
    """
    result = np.zeros(len(values))
    chosen = values[counted]
    if len(chosen) > 1:
        result[counted] = (chosen - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + WHITENING_EPSILON)
    return result


@dataclass(frozen=True)
class Scaling:
    """What a group's differences are divided by: the standard deviation of the group's rewards, of all rewards, or
    nothing. ddof 1: over n − 1, as in TRL and verl; 0: over n, as in open-instruct."""

    kind: Literal["Group", "Batch", "None"] = "Group"
    ddof: int = 1
    epsilon: float = 1e-4


def group_advantages(rewards: Numbers, group: NDArray[np.int64], scaling: Scaling) -> Numbers:
    """(R − mean of its group)/(std + ε) by sample, float64 [n]: Shao et al. 2024 (arXiv:2402.03300), §4.1.2.

    Exactly 0 where a reward was skipped, and in a group of equal rewards, whatever rounding makes of their mean.
    """
    result = np.zeros(len(rewards))
    whole = _deviation(rewards[~np.isnan(rewards)], scaling.ddof)
    for members in _counted_groups(rewards, group):
        found = rewards[members]
        if _equal(found):
            continue
        deviation = whole if scaling.kind == "Batch" else _deviation(found, scaling.ddof)
        divisor = 1.0 if scaling.kind == "None" else deviation + scaling.epsilon
        result[members] = (found - found.mean()) / divisor
    return result


def leave_one_out(rewards: Numbers, group: NDArray[np.int64]) -> Numbers:
    """R − mean of the others of its group, by sample: Ahmadian et al. 2024 (arXiv:2402.14740), §3.2. NaN where a reward
    was skipped, and where no other is left to compare with; exactly 0 in a group of equal rewards."""
    result = np.full(len(rewards), np.nan)
    for members in _counted_groups(rewards, group):
        found = rewards[members]
        if len(members) > 1:
            result[members] = 0.0 if _equal(found) else found - (found.sum() - found) / (len(found) - 1)
    return result


def normalized(advantages: Numbers) -> Numbers:
    """(A − mean)/(std + 1e-4) over all samples that have one, std over n − 1: TRL's, of RLOO. NaN stays NaN."""
    chosen = advantages[~np.isnan(advantages)]
    if not len(chosen):
        return advantages
    normal: Numbers = (advantages - chosen.mean()) / (_deviation(chosen, 1) + NORMALIZING_EPSILON)
    return normal


def sums(flat: Numbers, sizes: NDArray[np.int64]) -> Numbers:
    """Σ over the tokens of each sample, float64 [n]."""
    owners = np.repeat(np.arange(len(sizes)), sizes)
    return np.bincount(owners, weights=flat, minlength=len(sizes)).astype(np.float64)


def teaching(rewards: Numbers, group: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each group teaches something, bool [groups], by their numbers: at least two of its rewards were not
    skipped, and they differ."""
    return np.array([not _equal(rewards[members]) for members in _counted_groups(rewards, group)], dtype=np.bool_)


def zero_variance_share(rewards: Numbers, group: NDArray[np.int64]) -> float:
    """Groups that teach nothing / groups: TRL's frac_reward_zero_std."""
    found = teaching(rewards, group)
    return float((~found).mean()) if len(found) else 0.0


def explained_variance(returns: Numbers, values: Numbers) -> float:
    """1 − Var(R − V)/Var(R): 1 of a critic that knows the returns, 0 of one that says a constant, negative of one that
    is worse. 0 where all returns are equal and there is nothing to explain."""
    spread = float(np.var(returns)) if len(returns) else 0.0
    return 1 - float(np.var(returns - values)) / spread if spread > 0 else 0.0


def adapted(coefficient: float, found: float, samples: int, settings: AdaptiveKL) -> float:
    """The KL coefficient after a rollout of `samples` whose KL per sample was `found`: β·(1 + e·min(samples/horizon,
    1)), e = clip(found/target − 1, ±0.2). Without the 1, a rollout of more than five horizons would make β negative.

    Ziegler et al. 2019 (arXiv:1909.08593), §2.2, whose K_β is samples/horizon in their code.
    """
    error = min(max(found / settings.target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return coefficient * (1 + error * min(samples / settings.horizon, 1.0))


def overlong(sizes: NDArray[np.int64], most: int, penalty: OverlongPenalty) -> Numbers:
    """What is added to the reward of a completion of `sizes` tokens: 0 up to most − buffer, then falling linearly to
    −factor at `most`. DAPO (arXiv:2503.14476), equation 13."""
    beyond = np.clip(sizes - (most - penalty.buffer_tokens), 0, penalty.buffer_tokens)
    return -penalty.factor * beyond / penalty.buffer_tokens


def _counted_groups(rewards: Numbers, group: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Of each group, which samples have a reward; in order of the groups' numbers."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order])) + 1
    for members in np.split(order, starts) if len(order) else []:
        yield members[~np.isnan(rewards[members])]


def _equal(found: Numbers) -> bool:
    return len(found) < 2 or float(np.ptp(found)) <= EQUAL


def _deviation(found: Numbers, ddof: int) -> float:
    return float(found.std(ddof=ddof)) if len(found) > ddof else 0.0
