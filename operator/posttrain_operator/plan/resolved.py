"""`status.resolved`: the effective values under the spec's own names, "Auto" where the trainer's `prepare` decides.

Built with the plan, settled later with what `prepare` reported. What a user reads here can be copied into a spec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_api.records import Resolved
from posttrain_api.trainer import TrainerConfig
from posttrain_operator.plan.resolved_online import online_values, place
from posttrain_operator.plan.types import Placement, Resources

_TRAINING_NAMES = (
    "epochs",
    "maxSteps",
    "batchSize",
    "tokensPerMicroBatch",
    "learningRate",
    "schedule",
    "warmupSteps",
    "minLearningRateRatio",
    "weightDecay",
    "epsilon",
    "maxGradNorm",
    "seed",
    "precision",
)


@dataclass(frozen=True)
class Chosen:
    """What the plan decided beside the trainer's configuration. `model_secret`: name of the starting model's Secret."""

    image: str
    pod: Resources
    place: Placement
    model_secret: str | None = None


def resolved_values(config: TrainerConfig, chosen: Chosen) -> dict[str, Any]:
    """Effective values of one plan; only what is set."""
    values: dict[str, Any] = {
        "stage": config.stage,
        "algorithm": config.algorithm,
        "tuning": config.tuning,
        "lora": config.lora.to_wire() if config.lora else None,
        "model": _model(config, chosen.model_secret),
        "reference": _reference(config),
        "data": _data(config),
        "training": _training(config),
        **_objective(config),
        "deepspeed": _deepspeed(config),
        "evaluation": config.evaluation.to_wire() if config.data.eval else None,
        "guards": {"nonFinite": "Fail", **_rules(config)},
        "checkpoint": _checkpoint(config),
        "output": {"mergeAdapter": config.merge_adapter},
        "storage": {"uri": config.run_uri},
        "resources": _resources(config, chosen.pod, chosen.place),
        "image": chosen.image,
        "runPolicy": {"terminationGracePeriodSeconds": config.grace_seconds},
    }
    return {key: value for key, value in values.items() if value is not None}


_MEANT = {
    "SimPO": ("beta", "sftWeight", "gammaBetaRatio"),
    "DPO": ("beta", "labelSmoothing", "sftWeight", "cacheReference"),
    "RobustDPO": ("beta", "labelSmoothing", "sftWeight", "cacheReference"),
}
"""Which fields of the block an algorithm reads."""


def _objective(config: TrainerConfig) -> dict[str, Any]:
    """The block of the stage: only what its algorithm reads."""
    if config.stage == "RewardModel":
        return {"rewardModel": config.reward_model.to_wire()}
    if config.stage != "Preference" or config.algorithm is None:
        return online_values(config)
    meant = _MEANT.get(config.algorithm, ("beta", "sftWeight", "cacheReference"))
    wire = config.preference.to_wire()
    return {"preference": {name: wire[name] for name in meant}}


def _deepspeed(config: TrainerConfig) -> dict[str, Any]:
    said = {key: value for key, value in config.deepspeed.to_wire().items() if key != "overrides" or value}
    return {"zeroStage": config.zero_stage, **said}


def _reference(config: TrainerConfig) -> dict[str, Any] | None:
    return place(config.reference.source, config.reference.adapters) if config.reference else None


def _model(config: TrainerConfig, secret: str | None) -> dict[str, Any]:
    model = config.model
    values = {
        "uri": model.source.uri if model.source else None,
        "secretRef": {"name": secret} if secret else None,
        "adapters": [adapter.uri for adapter in model.adapters] or None,
        "scratch": model.scratch.to_wire() if model.scratch else None,
        "attention": model.attention,
        "trustRemoteCode": model.trust_remote_code,
    }
    if model.scratch and model.scratch.tokenizer:
        values["scratch"] = {**model.scratch.to_wire(), "tokenizer": {"uri": model.scratch.tokenizer.uri}}
    return {key: value for key, value in values.items() if value is not None}


def _data(config: TrainerConfig) -> dict[str, Any]:
    data = config.data
    return {
        "train": [source.uri for source in data.train],
        **({"eval": [source.uri for source in data.eval]} if data.eval else {}),
        "maxLength": data.max_length,
        **({"maxPromptLength": data.max_prompt_length} if data.max_prompt_length else {}),
        "lossOn": data.loss_on,
        "tooLong": data.too_long,
        "tooLongMaxFraction": data.too_long_max_fraction,
        "badRows": {"policy": data.bad_rows_policy, "maxFraction": data.bad_rows_max_fraction},
    }


def _training(config: TrainerConfig) -> dict[str, Any]:
    wire = config.training.to_wire()
    values = {name: wire[name] for name in _TRAINING_NAMES if name in wire}
    if config.training.gradient_checkpointing != "Auto":
        values["gradientCheckpointing"] = config.training.gradient_checkpointing
    return {**values, "betas": [config.training.beta1, config.training.beta2]}


def _rules(config: TrainerConfig) -> dict[str, Any]:
    rules = [rule.to_wire() for rule in config.guards.rules]
    return {"rules": rules} if rules else {}


def _checkpoint(config: TrainerConfig) -> dict[str, Any]:
    wire = config.checkpoint.to_wire()
    start = wire.pop("startFrom", None)
    return {**wire, **({"from": start["uri"]} if start else {})}


def _resources(config: TrainerConfig, pod: Resources, place: Placement) -> dict[str, Any]:
    values: dict[str, Any] = {
        "nodes": config.topology.nodes,
        "gpusPerNode": config.topology.gpus_per_node,
        "processesPerNode": config.topology.processes_per_node,
        "gpuResourceName": pod.gpu_resource_name if pod.gpus else None,
        "cpu": pod.cpu,
        "memory": pod.memory,
        "sharedMemory": pod.shared_memory,
        "priorityClassName": place.priority_class_name,
        "schedulerName": place.scheduler_name,
    }
    return {key: value for key, value in values.items() if value is not None}


def settle(resolved: Mapping[str, Any], prepared: Resolved | None) -> dict[str, Any]:
    """`resolved` with what `prepare` decided in place of "Auto", and what only it knows: total steps, revision,
    sizes."""
    if prepared is None:
        return dict(resolved)
    training: dict[str, Any] = {
        "warmupSteps": prepared.warmup_steps,
        "totalSteps": prepared.total_steps,
        "precision": prepared.precision,
    }
    if prepared.gradient_checkpointing is not None:
        training["gradientCheckpointing"] = prepared.gradient_checkpointing
    model: dict[str, Any] = {
        "attention": prepared.attention,
        "revision": prepared.revision,
        "parameters": prepared.parameters,
        "trainableParameters": prepared.trainable_parameters,
    }
    known = {key: value for key, value in model.items() if value is not None}
    return {
        **resolved,
        "training": {**resolved.get("training", {}), **training},
        "model": {**resolved.get("model", {}), **known},
        "deepspeed": {**resolved.get("deepspeed", {}), "zeroStage": prepared.zero_stage},
    }
