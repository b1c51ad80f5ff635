"""What a job may say to DeepSpeed: the ZeRO stage, offloading, and overrides of its configuration.

Overrides are free, but for the keys of `deepspeed_keys`: those stand in the schema, each with the word what to do
instead, so that `kubectl explain` tells it and the API server's rules (which see declared fields only) can refuse
them by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

from posttrain_api.deepspeed_keys import OWNED, REMOVED
from posttrain_api.spec.fields import SpecModel, optional

MAX_OVERRIDES = 64
FLAGS = frozenset(
    {
        *("managed_gradient_accumulation", "prescale_gradients", "zero_allow_untested_optimizer"),
        *("zero_force_ds_cpu_optimizer", "use_node_local_storage", "dataloader_drop_last", "sparse_gradients"),
        *("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"),
        *("cpu_offload", "cpu_offload_param", "elastic_checkpoint", "mics_hierarchical_params_gather"),
        "graph_harvesting",
    }
)
BLOCKS = frozenset(
    {
        *("optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "data_types", "activation_checkpointing"),
        *("checkpoint", "data_efficiency", "tensor_parallel", "expert_parallel", "pipeline", "compile"),
        *("hybrid_engine", "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity"),
        *("nebula", "progressive_layer_drop", "quantize_training", "sparse_attention", "zenflow"),
        "zeropp_loco_param",
    }
)
"""What tutorials write below a key; all others hold a number or a text."""


def refused_paths() -> dict[str, str]:
    """Dotted path below `overrides` → what to do instead, for every key that may not be there."""
    owned = {path: why if why.startswith("set ") else f"remove it: {why}" for path, why in OWNED.items()}
    return {**owned, **dict.fromkeys(REMOVED, "remove it: DeepSpeed 0.19 would refuse to start")}


def containers() -> tuple[str, ...]:
    """Paths of the blocks that hold refused keys beside free ones, the outer ones first."""
    steps = [path.split(".") for path in refused_paths()]
    found = {".".join(parts[:depth]) for parts in steps for depth in range(len(parts))}
    return tuple(sorted(found, key=lambda path: (len(path.split(".")) if path else 0, path)))


def _refused(name: str, instead: str) -> dict[str, Any]:
    kind: dict[str, Any] = {"x-kubernetes-int-or-string": True, "maxLength": 256}
    if name in FLAGS:
        kind = {"type": "boolean"}
    if name in BLOCKS:
        kind = {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "maxProperties": MAX_OVERRIDES}
    return {**kind, "description": f"Refused: {instead}. Default: the trainer's. Example: none."}


def _block(path: str) -> dict[str, Any]:
    prefix = f"{path}." if path else ""
    inner = {at.removeprefix(prefix): _block(at) for at in containers() if at and at.rpartition(".")[0] == path}
    keys = {at.removeprefix(prefix): why for at, why in refused_paths().items() if at.rpartition(".")[0] == path}
    return {
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": True,
        "maxProperties": MAX_OVERRIDES,
        "properties": {**{name: _refused(name, why) for name, why in keys.items()}, **inner},
        "description": "A block of DeepSpeed's configuration; its keys here are those that are refused. Example: {}.",
    }


def _check_blocks(overrides: dict[str, Any]) -> dict[str, Any]:
    for path in containers():
        node: Any = overrides
        for key in path.split(".") if path else ():
            node = node.get(key) if isinstance(node, dict) else None
        if node is not None and not isinstance(node, dict):
            raise ValueError(f"must have a block of fields at {path}")
        if node is not None and len(node) > MAX_OVERRIDES:
            raise ValueError(f"must have at most {MAX_OVERRIDES} fields" + (f" at {path}" if path else ""))
    return overrides


Overrides = Annotated[dict[str, Any], AfterValidator(_check_blocks), WithJsonSchema(_block(""))]


def _no_truth(value: object) -> object:
    if isinstance(value, bool):  # to Python, true is 1
        raise ValueError("must be one of Auto, 0, 1, 2, 3")
    return value


ZeroStage = Annotated[
    Literal["Auto", 0, 1, 2, 3],
    BeforeValidator(_no_truth),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "enum": ["Auto", 0, 1, 2, 3]}),
]


class DeepSpeed(SpecModel):
    """What is said to DeepSpeed; everything else follows from the job."""

    zero_stage: ZeroStage | None = optional(
        "What ZeRO shards over the ranks: 0 nothing (FP32 only), 1 optimizer state, 2 also gradients, 3 also "
        "weights. Auto decides by the model's "
        "size; the choice stands in status.resolved",
        default="Auto",
        example=2,
    )
    offload_optimizer: bool | None = optional(
        "Keep the optimizer's state in main memory and step on the CPU: slower, for models that do not fit otherwise",
        default="false",
        example=True,
    )
    offload_parameters: bool | None = optional(
        "Keep the weights in main memory too (zeroStage 3 only)", default="false", example=True
    )
    overrides: Overrides | None = optional(
        "Keys of DeepSpeed's own configuration, laid over the trainer's. Refused are keys that the trainer sets "
        "itself and keys that DeepSpeed has removed: they are the fields listed here; and any other key at the top "
        "that nothing reads. At most 16 KiB as JSON",
        default="none",
        example={"zero_optimization": {"reduce_bucket_size": 50000000}},
    )
