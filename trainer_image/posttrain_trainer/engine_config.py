"""The configuration that DeepSpeed is given, and what a job may say of it. Pure; used by engine.py.

The micro-batches are the loop's own business (managed accumulation off: in managed mode ZeRO-2 would keep the last one
only), gradients are accumulated in fp32, and the optimizer is the trainer's. `deepspeed.overrides` are laid over the
rest: a key of ours in them is refused by name, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain_api.deepspeed_keys import refused_keys
from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure


@dataclass(frozen=True)
class EngineSettings:
    """`max_grad_norm` 0 switches clipping off. `adapter`: only part of the model learns; checkpoints leave the rest
    out. `bf16`: weights and activations in bf16, with fp32 masters and fp32 gradients; needs ZeRO 1 or more.
    `quantized`: the frozen layers are kept in 4 bits; not at ZeRO 3."""

    zero_stage: int
    max_grad_norm: float
    adapter: bool = False
    bf16: bool = False
    quantized: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tag: str = "ds"
    """Folder of its files inside a checkpoint."""


def deepspeed_config(settings: EngineSettings, persistence_threshold: int) -> dict[str, Any]:
    """The whole, overrides laid over. TrainerFailure(ImageIncompatible) where they name a key of ours."""
    if settings.bf16 and settings.zero_stage == 0:
        raise _refused(
            "training.precision: BF16 needs ZeRO 1, 2 or 3, which keep fp32 masters; deepspeed.zeroStage is 0"
        )
    if settings.offload_parameters and settings.zero_stage < 3:
        raise _refused(f"deepspeed.offloadParameters needs ZeRO 3; deepspeed.zeroStage is {settings.zero_stage}")
    if settings.offload_optimizer and settings.zero_stage == 0:
        raise _refused("deepspeed.offloadOptimizer needs ZeRO 1, 2 or 3; deepspeed.zeroStage is 0")
    if settings.quantized and settings.zero_stage == 3:
        raise _refused("lora.quantization needs ZeRO 0, 1 or 2; deepspeed.zeroStage is 3")
    refused = refused_keys(settings.overrides)
    if refused:
        raise _refused("; ".join(f"deepspeed.overrides.{path}: {why}" for path, why in refused.items()))
    return laid_over(_own(settings, persistence_threshold), settings.overrides)


def _own(settings: EngineSettings, persistence_threshold: int) -> dict[str, Any]:
    clip = 0.0 if settings.zero_stage == 0 else settings.max_grad_norm
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero(settings, persistence_threshold),
    }
    if settings.bf16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # DeepSpeed's default would add up in bf16
    if settings.offload_optimizer or settings.offload_parameters:
        # The optimizer stays torch's: DeepSpeed's own CPU Adam would be compiled at its first use, on every node.
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def _zero(settings: EngineSettings, persistence_threshold: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": settings.zero_stage, "overlap_comm": False}
    if settings.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = persistence_threshold
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return zero


def laid_over(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the values of `overrides`, objects merged key by key."""
    merged = dict(config)
    for key, value in overrides.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = laid_over(below, value)
        else:
            merged[key] = value
    return merged


def _refused(what: str) -> TrainerFailure:
    return TrainerFailure(
        Reason.IMAGE_INCOMPATIBLE,
        f"{what}. This trainer cannot run it: correct the job, or use the operator's own image.",
    )
