"""Which keys of a DeepSpeed configuration `spec.deepspeed.overrides` may not name, and why.

One list for the API's rules, which refuse them when the job is applied, and for the trainer, which refuses them once
more before it lays the overrides over its own configuration: a job may come from an older operator. Keys are dotted
paths; a path stands for everything below it. At the top DeepSpeed ignores what it does not know without a word, so
what may stand there is listed too; inside its blocks it looks itself. It must not know what a free key means: that is
DeepSpeed's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

_UPDATE = "the update does not depend on how rows are cut, and the trainer sees to that"
_NONE = "the trainer does not use it"

OWNED: dict[str, str] = {
    "train_batch_size": "set training.batchSize",
    "train_micro_batch_size_per_gpu": "set training.tokensPerMicroBatch",
    "gradient_accumulation_steps": "set training.tokensPerMicroBatch",
    "managed_gradient_accumulation": _UPDATE,
    "gradient_allreduce_op": _UPDATE,
    "gradient_predivide_factor": _UPDATE,
    "prescale_gradients": _UPDATE,
    "gradient_clipping": "set training.maxGradNorm",
    "optimizer": "set training.betas, epsilon and weightDecay",
    "scheduler": "set training.schedule",
    "zero_allow_untested_optimizer": "the optimizer is the trainer's",
    "zero_force_ds_cpu_optimizer": "the optimizer is the trainer's",
    "bf16": "set training.precision",
    "fp16": "set training.precision",
    "torch_autocast": "set training.precision",
    "data_types": "gradients are accumulated in fp32",
    "activation_checkpointing": "set training.gradientCheckpointing",
    "steps_per_print": "the trainer reports its steps itself",
    "checkpoint": "the trainer commits its checkpoints itself",
    "use_node_local_storage": "the trainer commits its checkpoints itself",
    "dataloader_drop_last": "the trainer feeds its rows itself",
    "data_efficiency": "the trainer feeds its rows itself",
    "sequence_parallel_size": _NONE,
    "tensor_parallel": _NONE,
    "expert_parallel": _NONE,
    "pipeline": _NONE,
    "compile": _NONE,
    "hybrid_engine": _NONE,
    "zero_optimization.stage": "set deepspeed.zeroStage",
    "zero_optimization.offload_optimizer.device": "set deepspeed.offloadOptimizer",
    "zero_optimization.offload_optimizer.nvme_path": "state on a disk is not saved with a checkpoint",
    "zero_optimization.offload_param.device": "set deepspeed.offloadParameters",
    "zero_optimization.offload_param.nvme_path": "state on a disk is not saved with a checkpoint",
    "zero_optimization.cpu_offload": "set deepspeed.offloadOptimizer",
    "zero_optimization.cpu_offload_param": "set deepspeed.offloadParameters",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "the export needs it",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "the export needs it",
    "zero_optimization.elastic_checkpoint": "the trainer commits its checkpoints itself",
    "zero_optimization.zenflow": _NONE,
}
"""Keys that the trainer sets itself, with what to do instead."""

REMOVED: tuple[str, ...] = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
    "zero_optimization.mics_shard_size",
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.zeropp_loco_param",
)
"""Keys of old tutorials that DeepSpeed 0.19 refuses."""


FREE = frozenset(
    {
        "zero_optimization",
        *("communication_data_type", "disable_allgather"),
        *("comms_logger", "flops_profiler", "timers", "wall_clock_breakdown", "memory_breakdown"),
        *("tensorboard", "wandb", "csv_monitor", "comet"),
        *("dump_state", "log_level", "disable_python_gc", "vocabulary_size"),
    }
)
"""Keys at the top that DeepSpeed 0.19 reads and that do something in this trainer."""


def refused_keys(overrides: Mapping[str, Any]) -> dict[str, str]:
    """Dotted path → why, for every key that may not be there; a value that replaces a whole block that holds owned
    keys is refused as well, and so is a key at the top that nobody would read."""
    found = {key: _unknown(key) for key in overrides if key not in FREE and key not in OWNED and key not in REMOVED}
    for path, value in _paths(overrides, ""):
        if path in OWNED:
            found[path] = f"it is the trainer's own: {OWNED[path]}"
        elif path in REMOVED:
            found[path] = "DeepSpeed 0.19 has removed it"
        elif not isinstance(value, Mapping) and any(owned.startswith(path + ".") for owned in OWNED):
            found[path] = "it must be an object: the trainer sets some of the keys in it"
    return found


def _unknown(key: str) -> str:
    known = sorted({*FREE, *(path for path in (*OWNED, *REMOVED) if "." not in path)})
    close = difflib.get_close_matches(key, known, n=1)
    return f"nothing here reads it; {f'did you mean {close[0]}?' if close else 'known are ' + ', '.join(sorted(FREE))}"


def _paths(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Every key with its value, from the outside in."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        yield path, value
        if isinstance(value, Mapping):
            yield from _paths(value, path + ".")
