"""The records of what is learned from pairs, of evaluation, and of what DeepSpeed is told: said, else built in."""

from __future__ import annotations

import json
from typing import Literal

from posttrain_api.deepspeed_keys import refused_keys
from posttrain_api.spec.deepspeed import DeepSpeed
from posttrain_api.spec.objectives import Preference, RewardModel
from posttrain_api.spec.training import Evaluation
from posttrain_api.trainer import Algorithm, DeepSpeedConfig, EvaluationConfig, PreferenceConfig, RewardModelConfig
from posttrain_operator.plan.context import Context
from posttrain_operator.plan.defaults import BETA, BETA_SIMPO, GAMMA_BETA_RATIO, MAX_OVERRIDES_BYTES
from posttrain_operator.plan.errors import refuse
from posttrain_operator.plan.training import pick

_FIRST: dict[str, Algorithm] = {"Preference": "DPO", "RL": "GRPO"}


def algorithm(context: Context) -> Algorithm | None:
    """DPO where stage Preference says nothing, GRPO where RL does; None in other stages."""
    return context.spec.algorithm or _FIRST.get(context.spec.stage)


def preference_config(context: Context) -> PreferenceConfig:
    """The preference loss's record; SimPO's beta is of another size, because it has no reference."""
    said = context.spec.preference or Preference()
    return PreferenceConfig(
        beta=pick(said.beta, BETA_SIMPO if context.spec.algorithm == "SimPO" else BETA),
        label_smoothing=pick(said.label_smoothing, 0.0),
        sft_weight=pick(said.sft_weight, 0.0),
        gamma_beta_ratio=pick(said.gamma_beta_ratio, GAMMA_BETA_RATIO),
        cache_reference=bool(said.cache_reference),
    )


def reward_model_config(context: Context) -> RewardModelConfig:
    """The reward model's record."""
    said = context.spec.reward_model or RewardModel()
    return RewardModelConfig(centering=pick(said.centering, 0.0), margin_column=said.margin_column)


def evaluation_config(context: Context) -> EvaluationConfig:
    """When data.eval is evaluated, and what is best: the loss, in stage RL the reward."""
    said = context.spec.evaluation or Evaluation()
    metric = said.metric or ("eval_reward" if context.spec.stage == "RL" else "eval_loss")
    return EvaluationConfig(
        every_steps=said.every_steps,
        metric=metric,
        goal=said.goal or ("Maximize" if metric == "eval_reward" else "Minimize"),
        keep_best=bool(said.keep_best),
    )


def zero_stage(context: Context) -> Literal["Auto", 0, 1, 2, 3]:
    """As said, else Auto."""
    said = context.spec.deepspeed.zero_stage if context.spec.deepspeed else None
    return "Auto" if said is None else said


def deepspeed_config(context: Context) -> DeepSpeedConfig:
    """Offloading and overrides. PlanError where these are larger than a ConfigMap and a status should hold, or have
    keys that nobody reads: the API server sees declared fields only."""
    said = context.spec.deepspeed or DeepSpeed()
    size = len(json.dumps(said.overrides or {}).encode())
    if size > MAX_OVERRIDES_BYTES:
        raise refuse(
            "spec.deepspeed.overrides",
            f"must have at most {MAX_OVERRIDES_BYTES} bytes as JSON",
            f"{size} bytes",
            "keep only the keys that differ from the trainer's",
        )
    if refused := refused_keys(said.overrides or {}):
        path, why = next(iter(refused.items()))
        raise refuse(f"spec.deepspeed.overrides.{path}", f"may not be set: {why}", path, "correct or remove the key")
    return DeepSpeedConfig(
        offload_optimizer=bool(said.offload_optimizer),
        offload_parameters=bool(said.offload_parameters),
        overrides=said.overrides or {},
    )
