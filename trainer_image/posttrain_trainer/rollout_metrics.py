"""What is reported of a rollout, under TRL's names. Pure; called by the collector and the evaluation of stage RL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from posttrain_trainer.advantages import zero_variance_share
from posttrain_trainer.drawing import Drawn
from posttrain_trainer.experience import OLD, ROLLOUT, Experience
from posttrain_trainer.metrics import Metrics


def metrics_of(drawn: Drawn, names: Sequence[str]) -> Metrics:
    """Rewards first: where a report has no room for all, the last ones are left out."""
    experience = drawn.experience
    return {**_rewards(experience, names), **_lengths(experience), **_work(drawn, names)}


def _rewards(experience: Experience, names: Sequence[str]) -> Metrics:
    """`reward` and its standard deviation over all completions, as TRL, over n − 1; the same of each reward."""
    reward = experience.reward
    found = {
        "reward": _mean(reward),
        "reward_std": _deviation(reward),
        "frac_reward_zero_std": zero_variance_share(reward, experience.group),
    }
    for name, values in zip(names, experience.rewards.T, strict=True):
        found |= {f"rewards/{name}/mean": _mean(values), f"rewards/{name}/std": _deviation(values)}
    return found


def _lengths(experience: Experience) -> Metrics:
    """Completion tokens of all samples and of those that a stop token ended; the share of those cut off."""
    found = {f"completions/{name}_length": value for name, value in _three(experience.sizes).items()}
    ended = experience.sizes[experience.ended]
    found |= {f"completions/{name}_terminated_length": value for name, value in _three(ended).items()}
    return {**found, "completions/clipped_ratio": 1.0 - float(experience.ended.mean())}


def _work(drawn: Drawn, names: Sequence[str]) -> Metrics:
    failures = {f"rewards/{name}/failures": float(drawn.failures.get(name, 0)) for name in names}
    return failures | {f"rewards/{name}/seconds": float(drawn.seconds.get(name, 0.0)) for name in names}


def sampling_difference(experience: Experience) -> Metrics:
    """|log p of the trainer − log p of the rollout engine| over tokens; {} where the trainer's is not known."""
    if OLD not in experience.each:
        return {}
    difference = np.abs(experience.each[OLD] - experience.each[ROLLOUT])
    return {
        "sampling/sampling_logp_difference/mean": float(difference.mean()),
        "sampling/sampling_logp_difference/max": float(difference.max()),
    }


def _three(lengths: NDArray[np.int64]) -> Metrics:
    """TRL reports 0 where no completion ended."""
    if not len(lengths):
        return dict.fromkeys(("mean", "min", "max"), 0.0)
    return {"mean": float(lengths.mean()), "min": float(lengths.min()), "max": float(lengths.max())}


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0


def _deviation(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0
