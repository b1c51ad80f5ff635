"""What is trained: the policy or the reward model, made or loaded in fp32, with its adapter.

Called by assemble before DeepSpeed sees anything. Every rank makes the same weights: drawn from the job's seed,
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
from posttrain_trainer.loading import ModelFolder, load_causal, load_reward
from posttrain_trainer.lora import add_adapter
from posttrain_trainer.model_files import CONFIG, digest_of, weight_files
from posttrain_trainer.prepared import Prepared
from posttrain_trainer.score_model import ScoreModel
from posttrain_trainer.scorer import Scorer, check_head


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


def build_module(config: TrainerConfig, prepared: Prepared) -> nn.Module:
    """What the engine runs, in fp32 on the CPU: the policy's scorer, or the reward model; with its adapter under LoRA.
    TrainerFailure where the model cannot be used."""
    if config.stage == "RewardModel":
        reward = load_reward(_folder(config, prepared), Path(prepared.tokenizer_dir), config.training.seed)
        return ScoreModel(_adapted(config, reward))
    return Scorer(_adapted(config, _policy(config, prepared)))


def _policy(config: TrainerConfig, prepared: Prepared) -> Any:
    folder = _folder(config, prepared)
    if config.model.scratch is None:
        return load_causal(folder)
    shape = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        drawn = transformers.AutoModelForCausalLM.from_config(
            shape, attn_implementation=folder.attention, dtype=torch.float32
        )
    check_head(drawn)
    return drawn


def _folder(config: TrainerConfig, prepared: Prepared) -> ModelFolder:
    attention = prepared.resolved.attention.lower()
    return ModelFolder(Path(prepared.model_dir), attention, config.model.trust_remote_code)


def _adapted(config: TrainerConfig, model: Any) -> Any:
    if config.lora is None or config.tuning != "LoRA":
        return model
    return add_adapter(model, config.lora, config.training.seed, scores=config.stage == "RewardModel")
