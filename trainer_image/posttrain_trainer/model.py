"""What is trained: the policy or the reward model, made or loaded in fp32, with its adapter.

Called by assemble before DeepSpeed sees anything. Every rank makes the same weights: drawn from the job's seed,
or read from the folder that `prepare` left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from posttrain_api.reasons import Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import nf4
from posttrain_trainer.adapters import adapter_files
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.loading import ModelFolder, load_causal, load_reward
from posttrain_trainer.lora import add_adapter, continue_adapter
from posttrain_trainer.model_files import CONFIG, digest_of, weight_files
from posttrain_trainer.prepared import Prepared, PreparedModel
from posttrain_trainer.score_model import ScoreModel
from posttrain_trainer.scorer import Scorer, check_head


def check_unchanged(config: TrainerConfig, prepared: Prepared) -> None:
    """The folders of all models and adapters are still those that were prepared. TrainerFailure(ModelIncompatible);
    reads every file of them."""
    for given, model in _given_models(config, prepared):
        folder, uri = Path(model.dir), given.source.uri
        _check_digest(uri, model.digest, [folder / CONFIG, *weight_files(folder, uri)])
        for source, adapter in zip(given.adapters, model.adapters, strict=True):
            _check_digest(source.uri, adapter.digest, adapter_files(Path(adapter.dir)))


def _given_models(config: TrainerConfig, prepared: Prepared) -> Iterator[tuple[Any, PreparedModel]]:
    """What the job names as (source, adapters), and where it is: the starting model, the reference, PPO's critic, the
    models of rewards."""
    folders = (
        (config.model, prepared.model_dir, prepared.model_digest, prepared.adapters),
        (config.reference, prepared.reference_dir, prepared.reference_digest, prepared.reference_adapters),
        (config.critic, prepared.critic_dir, prepared.critic_digest, prepared.critic_adapters),
    )
    for given, folder, digest, adapters in folders:
        if given is not None and given.source is not None and folder is not None and digest is not None:
            yield given, PreparedModel(dir=folder, digest=digest, adapters=adapters)
    for reward in config.rewards:
        if reward.model is not None:
            yield reward.model, prepared.reward_models[reward.name]


def _check_digest(uri: str, then: str, files: list[Path]) -> None:
    digest = digest_of(files)
    if digest != then:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{uri}: its files changed after this job had begun ({then} then, {digest} now). "
            "Put the old files back, or run a new job.",
        )


@dataclass(frozen=True)
class Counts:
    """Parameters of the whole model and those that learn; tied ones count once."""

    parameters: int
    trainable: int


def count(model: nn.Module) -> Counts:
    """Before the engine is made: ZeRO-3 leaves empty tensors behind."""
    sizes = [(nf4.elements(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return Counts(sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns))


def build_module(config: TrainerConfig, prepared: Prepared) -> nn.Module:
    """What the engine runs, in fp32 on the CPU: the policy's scorer, or the reward model; with its adapter under LoRA,
    and the frozen layers below it in 4 bits where the job says so. TrainerFailure where the model cannot be used."""
    adapted = build_language_model(config, prepared)
    return ScoreModel(adapted) if config.stage == "RewardModel" else Scorer(adapted, temperature(config))


def build_language_model(config: TrainerConfig, prepared: Prepared) -> Any:
    """What `build_module` wraps: a transformers model, or peft's around it."""
    model = load_start(config, prepared)
    store(config, prepared, model)
    adapted = _adapted(config, prepared, model)
    if prepared.resolved.gradient_checkpointing:
        checkpoint_layers(model)  # peft, when it finds it on, asks for gradients of the inputs too
    return adapted


def store(config: TrainerConfig, prepared: Prepared, model: Any) -> None:
    """Puts the layers that an adapter will freeze into 4 bits, where the job says so."""
    if nf4.asked(config):
        nf4.quantize(model, torch.bfloat16 if prepared.resolved.precision == "BF16" else torch.float32)


def temperature(config: TrainerConfig) -> float:
    """What logits are divided by. In stage RL the policy is the distribution that is sampled from; elsewhere 1."""
    return config.rollout.temperature if config.stage == "RL" else 1.0


def checkpoint_layers(model: Any) -> None:
    """Each layer's activations are computed again in the backward. Not the reentrant kind: that one needs inputs with a
    gradient, which a frozen base has not, and runs hooks twice. TrainerFailure(ModelIncompatible)."""
    if not model.supports_gradient_checkpointing:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"training.gradientCheckpointing: {type(model).__name__} cannot do it. Set it to false.",
        )
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


def load_start(config: TrainerConfig, prepared: Prepared) -> Any:
    """The model that training starts from, in fp32, without the adapter that is trained and never quantized."""
    folder = start_folder(config, prepared)
    if config.stage == "RewardModel":
        return load_reward(folder, Path(prepared.tokenizer_dir), config.training.seed)
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


def start_folder(config: TrainerConfig, prepared: Prepared) -> ModelFolder:
    """What training starts from: the model and the adapters that are merged into it, without one that is continued."""
    merged = prepared.adapters[:-1] if _continues(config) else prepared.adapters
    adapters = tuple(Path(adapter.dir) for adapter in merged)
    attention = prepared.resolved.attention.lower()
    return ModelFolder(Path(prepared.model_dir), adapters, attention, config.model.trust_remote_code)


def _continues(config: TrainerConfig) -> bool:
    return config.tuning == "LoRA" and config.lora is not None and config.lora.continue_adapter


def _adapted(config: TrainerConfig, prepared: Prepared, model: Any) -> Any:
    if config.lora is None or config.tuning != "LoRA":
        return model
    if config.lora.continue_adapter:
        return continue_adapter(model, config.lora, Path(prepared.adapters[-1].dir))
    return add_adapter(model, config.lora, config.training.seed, scores=config.stage == "RewardModel")
