"""The names of a job's metrics, as its lines in metrics.jsonl have them: what spec.guards may name.

`NAME` is what any job may measure, for the API server; `measured` is what one job does measure at every step, for the
plan and the trainer. Names are TRL's. Phases' times are not here: a step has those of its own phases only. A test of
the trainer holds the lists against what is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from posttrain_api.trainer import TrainerConfig

EVALUATION = "eval_"
"""Prefix of what an evaluation measures."""

ALWAYS = (
    *("loss", "grad_norm", "learning_rate", "epoch", "num_tokens"),
    *("step_time", "tokens_per_second", "memory_bytes"),
)
_LANGUAGE = ("mean_token_accuracy", "entropy")
_SCORES = ("accuracy", "margin", "mean_reward")
_PAIRS = (
    *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
    *(f"logps/{name}" for name in ("chosen", "rejected")),
    *_LANGUAGE,
)
_OF_REWARD = ("mean", "std", "failures", "seconds")
_GROUPS = ("reward_std", "frac_reward_zero_std")
"""Not of an evaluation, which has one completion for each prompt."""
_COMPLETIONS = (
    *(f"completions/{name}{kind}_length" for kind in ("", "_terminated") for name in ("mean", "min", "max")),
    "completions/clipped_ratio",
)
SAMPLING_DIFFERENCE = "sampling/sampling_logp_difference/mean"
_CORRECTION = tuple(f"sampling/importance_sampling_ratio/{name}" for name in ("min", "mean", "max"))
_CLIPS = tuple(f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean"))
_PPO = (
    *(f"policy/{name}" for name in ("approxkl_avg", "clipfrac_avg", "entropy_avg")),
    *("val/ratio", "val/ratio_var"),
    *(f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores")),
    *("val/explained_variance", "val/clipfrac_avg", "critic/loss", "critic/grad_norm"),
)
_TERMS = ("preference", "sft", "ranking", "centering", "policy", "kl_penalty")
"""Terms of a loss, each reported where there are several."""

_ANY = (
    *(*ALWAYS, *_LANGUAGE, *_SCORES, *_PAIRS, "reward", *_GROUPS, *_COMPLETIONS, SAMPLING_DIFFERENCE, *_CORRECTION),
    *(*_CLIPS, *_PPO, "kl", *(f"loss/{term}" for term in _TERMS)),
)
NAME = (
    rf"(?:{EVALUATION})?(?:{'|'.join(map(re.escape, dict.fromkeys(_ANY)))}|"
    rf"rewards/[A-Za-z][A-Za-z0-9_-]*/(?:{'|'.join(_OF_REWARD)}))"
)
"""A pattern, of RE2 and Python alike."""


def measured(config: TrainerConfig) -> tuple[str, ...]:
    """Metrics of every step of this job, then those of its evaluations."""
    own = tuple(_OF_STAGE[config.stage](config))
    return (*ALWAYS, *own, *(_evaluated(config, own) if config.data.eval else ()))


def _evaluated(config: TrainerConfig, own: tuple[str, ...]) -> Iterator[str]:
    if config.stage != "RL":
        yield from (EVALUATION + name for name in ("loss", *own))
        return
    yield from (EVALUATION + name for name in _of_rollouts(config) if name not in _GROUPS)


def _language(config: TrainerConfig) -> Iterator[str]:
    yield from _LANGUAGE


def _terms(*names: str) -> Iterator[str]:
    """A loss of one term is the loss itself."""
    yield from (f"loss/{name}" for name in (names if len(names) > 1 else ()))


def _pairs(config: TrainerConfig) -> Iterator[str]:
    yield from _terms("preference", *(["sft"] if config.preference.sft_weight else []))
    yield from _PAIRS


def _scores(config: TrainerConfig) -> Iterator[str]:
    yield from _terms("ranking", *(["centering"] if config.reward_model.centering else []))
    yield from _SCORES


def _online(config: TrainerConfig) -> Iterator[str]:
    yield from (*_of_rollouts(config), SAMPLING_DIFFERENCE)
    yield from _OF_ALGORITHM[config.algorithm or "GRPO"](config)


def _of_rollouts(config: TrainerConfig) -> Iterator[str]:
    yield from ("reward", *_GROUPS)
    yield from (f"rewards/{reward.name}/{what}" for reward in config.rewards for what in _OF_REWARD)
    yield from _COMPLETIONS


def _grpo(config: TrainerConfig) -> Iterator[str]:
    yield from _terms("policy", *(["kl_penalty"] if config.grpo.beta else []))
    yield from ("entropy", *(["kl"] if config.grpo.beta else []), *_CLIPS)
    yield from _CORRECTION if config.grpo.sampler_correction != "None" else ()


def _rloo(config: TrainerConfig) -> Iterator[str]:
    yield from ("entropy", *(["kl"] if config.rloo.kl_coefficient else []), *_CLIPS)


def _ppo(config: TrainerConfig) -> Iterator[str]:
    yield from _PPO


_OF_ALGORITHM: Mapping[str, Callable[[TrainerConfig], Iterator[str]]] = {"GRPO": _grpo, "RLOO": _rloo, "PPO": _ppo}
_OF_STAGE: Mapping[str, Callable[[TrainerConfig], Iterator[str]]] = {
    "Pretrain": _language,
    "SFT": _language,
    "RewardModel": _scores,
    "Preference": _pairs,
    "RL": _online,
}
