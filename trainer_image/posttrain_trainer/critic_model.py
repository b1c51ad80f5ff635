"""PPO's critic, made or loaded in fp32 before DeepSpeed sees anything, alike on every rank.

Called by assemble: for a critic of its own, or for policy and critic on one base. A critic begins as the policy with a
head of zeros, so that advantages are plain rewards until it has learned something; or as a reward model with that one's
head, whose score of a whole answer is a value from the first step on (Stiennon et al. 2020, §3.4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain_api.reasons import Reason
from posttrain_api.trainer import LoraConfig, TrainerConfig
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.lazy import Lazy
from posttrain_trainer.loading import ModelFolder, load_critic
from posttrain_trainer.lora import add_second, add_to_body
from posttrain_trainer.model import build_language_model, build_module, checkpoint_layers, store, temperature
from posttrain_trainer.prepared import Prepared
from posttrain_trainer.score_model import ScoreHead
from posttrain_trainer.scorer import causal_lm
from posttrain_trainer.value_model import CRITIC, SharedModel, ValueModel

peft = Lazy("peft")


def build_policy(config: TrainerConfig, prepared: Prepared) -> nn.Module:
    """What the policy's engine runs: `build_module`, with PPO's critic on the same base where the job says so."""
    critic = config.critic if config.algorithm == "PPO" else None
    return build_module(config, prepared) if critic is None or not critic.shared else build_shared(config, prepared)


def build_critic(config: TrainerConfig, prepared: Prepared) -> ValueModel:
    """A model of its own; under LoRA a frozen body with an adapter, and the head. TrainerFailure where it cannot be
    used."""
    body, head = load_critic(_folder(config, prepared))
    lm = body
    if config.tuning == "LoRA" and config.lora is not None:
        store(config, prepared, body)
        lm = add_to_body(body, _lora(config.lora, prepared), config.training.seed)
    if prepared.resolved.gradient_checkpointing:
        checkpoint_layers(body)
    return ValueModel(lm, head)


def build_shared(config: TrainerConfig, prepared: Prepared) -> SharedModel:
    """Policy and critic on one frozen base. TrainerFailure(ImageIncompatible) where the job does not go with it."""
    if config.tuning != "LoRA" or config.lora is None or prepared.critic_dir is not None:
        raise TrainerFailure(
            Reason.IMAGE_INCOMPATIBLE,
            "critic.shared needs tuning LoRA and a critic that begins as the policy (no source, initFrom: Policy). "
            "Set critic.shared: false, or use the operator's own image.",
        )
    adapted: Any = build_language_model(config, prepared)
    add_second(adapted, CRITIC, _lora(config.lora, prepared), config.training.seed)
    head = ScoreHead(causal_lm(adapted).config.get_text_config().hidden_size, 1, bias=False, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    return SharedModel(adapted, head, temperature(config))


def _folder(config: TrainerConfig, prepared: Prepared) -> ModelFolder:
    """What the critic starts from; the policy's adapters are merged into it, one that the policy goes on with too."""
    own = prepared.critic_dir is not None
    adapters = prepared.critic_adapters if own else prepared.adapters
    return ModelFolder(
        Path(prepared.critic_dir or prepared.model_dir),
        tuple(Path(adapter.dir) for adapter in adapters),
        prepared.resolved.attention.lower(),
        config.model.trust_remote_code,
    )


def _lora(config: LoraConfig, prepared: Prepared) -> LoraConfig:
    """The critic's adapter is always a new one; where the policy goes on with one that has the rank, as large as it."""
    if config.rank is not None:
        return config
    theirs: Any = peft.PeftConfig.from_pretrained(prepared.adapters[-1].dir)
    return config.model_copy(update={"rank": theirs.r, "alpha": float(theirs.lora_alpha)})
