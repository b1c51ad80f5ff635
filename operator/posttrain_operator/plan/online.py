"""The records of stage RL: rollouts, the algorithm's block, the critic. Said, else what the records have built in.

The defaults of the algorithms stand in posttrain_api/online.py alone; only what depends on other fields is here.
"""

from __future__ import annotations

from typing import TypeVar

from posttrain_api.base import Model
from posttrain_api.online import (
    AdaptiveKL,
    CriticConfig,
    GRPOConfig,
    OverlongPenalty,
    PPOConfig,
    RLOOConfig,
    RolloutConfig,
)
from posttrain_api.spec.online import GRPO, PPO, RLOO, Critic, Rollout
from posttrain_operator.plan.chain import ModelPlace
from posttrain_operator.plan.context import Context
from posttrain_operator.plan.defaults import CRITIC_RATE_FACTOR
from posttrain_operator.plan.model import beside_place
from posttrain_operator.plan.training import pick

M = TypeVar("M", bound=Model)


def _filled(record: M, said: Model, *apart: str) -> M:
    """The record with what the block says under the same names; `apart`: names of another shape."""
    values = {name: getattr(said, name) for name in type(said).model_fields if name not in apart}
    return record.model_copy(update={name: value for name, value in values.items() if value is not None})


def rollout_config(context: Context, batch_size: int) -> RolloutConfig:
    """How completions are sampled; `batch_size`: prompts of one optimizer step."""
    return _filled(RolloutConfig(batch_size=batch_size), context.spec.rollout or Rollout())


def grpo_config(context: Context) -> GRPOConfig:
    """GRPO's block."""
    said = context.spec.grpo or GRPO()
    penalty = _filled(OverlongPenalty(buffer_tokens=1), said.overlong_penalty) if said.overlong_penalty else None
    refills = said.dynamic_sampling.max_refills if said.dynamic_sampling else 0
    record = GRPOConfig(overlong_penalty=penalty, max_refills=refills)
    return _filled(record, said, "overlong_penalty", "dynamic_sampling")


def ppo_config(context: Context) -> PPOConfig:
    """PPO's block."""
    said = context.spec.ppo or PPO()
    adaptive = _filled(AdaptiveKL(target=1.0), said.adaptive_kl) if said.adaptive_kl else None
    return _filled(PPOConfig(adaptive_kl=adaptive), said, "adaptive_kl")


def rloo_config(context: Context) -> RLOOConfig:
    """RLOO's block."""
    return _filled(RLOOConfig(), context.spec.rloo or RLOO())


def critic_place(context: Context) -> ModelPlace | None:
    """Where the critic's own model is; None: it begins as the reward model or as the policy."""
    said = context.spec.critic.model if context.spec.critic else None
    return beside_place(context, said, "spec.critic.model", "either") if said else None


def critic_config(context: Context, place: ModelPlace | None, policy_rate: float) -> CriticConfig | None:
    """PPO's value model. One that begins as the policy is an adapter on its base, where the policy is one too: the
    base is then held once."""
    if context.spec.algorithm != "PPO":
        return None
    said = context.spec.critic or Critic()
    init = said.init_from or "Policy"
    return CriticConfig(
        source=place.base.source if place else None,
        adapters=tuple(adapter.source for adapter in place.adapters) if place else (),
        init_from=init,
        learning_rate=pick(said.learning_rate, CRITIC_RATE_FACTOR * policy_rate),
        warmup_steps=pick(said.warmup_steps, 0),
        shared=context.tuning == "LoRA" and place is None and init == "Policy",
    )
