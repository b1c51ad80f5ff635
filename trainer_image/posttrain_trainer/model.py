"""The policy: a causal language model made or loaded in fp32, and its adapter.

Called by the worker before DeepSpeed sees anything. Every rank makes the same weights: drawn from the job's seed,
or read from the folder that `prepare` left.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from posttrain_api.reasons import Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.lora import add_adapter
from posttrain_trainer.model_files import CONFIG, digest_of, weight_files
from posttrain_trainer.prepared import Prepared
from posttrain_trainer.scorer import check_head


def check_unchanged(config: TrainerConfig, prepared: Prepared) -> None:
    """The model folder is still the one that was prepared. TrainerFailure(ModelIncompatible); reads every file of
    it."""
    if config.model.source is None:
        return
    folder, uri = Path(prepared.model_dir), config.model.source.uri
    digest = digest_of([folder / CONFIG, *weight_files(folder, uri)])
    if digest != prepared.model_digest:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{uri}: its files changed after this job had begun ({prepared.model_digest} then, {digest} now). "
            "Put the old files back, or run a new job.",
        )


@dataclass(frozen=True)
class Counts:
    """Parameters of the whole model and those that learn; tied ones count once."""

    parameters: int
    trainable: int


def count(model: nn.Module) -> Counts:
    """Before the engine is made: ZeRO-3 leaves empty tensors behind."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Counts(sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns))


def build_policy(config: TrainerConfig, prepared: Prepared) -> nn.Module:
    """The starting policy in fp32 on the CPU, with its adapter under LoRA. TrainerFailure where it cannot be used."""
    folder = Path(prepared.model_dir)
    options = {"attn_implementation": prepared.resolved.attention.lower(), "dtype": torch.float32}
    model: Any = _drawn(config, folder, options) if config.model.scratch else _loaded(config, folder, options)
    check_head(model)
    if config.lora is not None and config.tuning == "LoRA":
        model = add_adapter(model, config.lora, config.training.seed)
    policy: nn.Module = model
    return policy


def _drawn(config: TrainerConfig, folder: Path, options: dict[str, Any]) -> Any:
    shape = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        return transformers.AutoModelForCausalLM.from_config(shape, **options)


def _loaded(config: TrainerConfig, folder: Path, options: dict[str, Any]) -> Any:
    remote = config.model.trust_remote_code
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=remote, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{folder}: transformers {transformers.__version__} cannot load it as a causal language model: {error}. "
            "Check that config.json and the safetensors files belong together.",
        ) from error
    _check_complete(folder, info)
    return model


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    for what in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info.get(what) or ())
        if names:
            raise TrainerFailure(
                Reason.MODEL_INCOMPATIBLE,
                f"{folder}: {len(names)} weights are {what.removesuffix('_keys')}, the first is {names[0]}. "
                "They would be drawn at random; give a folder whose weights fit its config.json.",
            )
