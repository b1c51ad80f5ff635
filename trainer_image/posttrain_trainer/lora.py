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


def add_adapter(model: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """The model with a new adapter, drawn from `seed` alike on every rank. TrainerFailure where no module matches.

    Adapter weights keep the base's type: ZeRO holds the fp32 masters, and mixed types break its gathers.
    """
    targets: Any = ALL_LINEAR if config.target_modules == (ALL_LINEAR,) else list(config.target_modules)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted: nn.Module = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            raise TrainerFailure(
                Reason.MODEL_INCOMPATIBLE,
                f"spec.lora.targetModules: {list(config.target_modules)} does not fit this model ({error}). "
                f"Name its linear layers, or use [{ALL_LINEAR}].",
            ) from error
    return adapted


def adapter_size(model: nn.Module, rank: int) -> int:
    """Σ r·(d_in + d_out) over the adapted linear layers: what the number of trainable parameters must be."""
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)
