"""Low-rank adapters by peft: the base is frozen, two small matrices beside each linear layer learn.

h = (W + (alpha / rank) · B·A)·x (Hu et al. 2021, eq. 3); B starts at zero, so the first forward is the base's.
Called by model.py. Adapters are never switched with `set_adapter` or `disable_adapter`: under DeepSpeed both drop
gradients silently.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

from posttrain_api.reasons import Reason
from posttrain_api.trainer import LoraConfig
from posttrain_trainer.errors import TrainerFailure

ALL_LINEAR = "all-linear"


def add_adapter(model: nn.Module, config: LoraConfig, seed: int, *, scores: bool = False) -> nn.Module:
    """The model with a new adapter, drawn from `seed` alike on every rank. TrainerFailure where a name matches no
    module, or one whose weights another has too. `scores`: a reward model, whose head is trained whole beside it.

    Adapter weights keep the base's type: ZeRO holds the fp32 masters, and mixed types break its gathers.
    """
    targets: Any = ALL_LINEAR if config.target_modules == (ALL_LINEAR,) else list(config.target_modules)
    if targets != ALL_LINEAR:
        _check_names(model, targets)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",  # peft adds the head to modules_to_save
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted: nn.Module = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            raise _misfit(f"{list(config.target_modules)} does not fit this model ({error})") from error
    _check_tied(adapted)
    return adapted


def _check_names(model: nn.Module, targets: list[str]) -> None:
    """peft is content when one of the names is there."""
    modules = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in modules):
            raise _misfit(f"no module of this model is called {target!r}")


def _check_tied(adapted: Any) -> None:
    """An adapter merged into one of two tied weights would change the other too: a model that was never trained."""
    base = adapted.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if ends[0].weight is ends[1].weight and any(isinstance(end, peft.tuners.lora.LoraLayer) for end in ends):
        raise _misfit("input and output embeddings of this model are tied, neither can have an adapter of its own")


def _misfit(what: str) -> TrainerFailure:
    return TrainerFailure(
        Reason.MODEL_INCOMPATIBLE,
        f"spec.lora.targetModules: {what}. Name linear layers of the model's body, or use [{ALL_LINEAR}].",
    )


def adapter_size(model: nn.Module, rank: int) -> int:
    """Σ r·(d_in + d_out) over the adapted linear layers: what the number of trainable parameters must be."""
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)
