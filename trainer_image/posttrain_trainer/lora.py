"""Low-rank adapters by peft: the base is frozen, two small matrices beside each linear layer learn.

h = (W + s·B·A)·x with s = alpha / rank (Hu et al. 2021, eq. 3) or alpha / √rank (rsLoRA, Kalajdzievski 2023, eq. 2); B
starts at zero, so the first forward is the base's. DoRA (Liu et al. 2024, eq. 5) scales each row of W + s·B·A to a
length that is learned, and takes the length before that as a constant of the gradient.
Called by model.py. Adapters are never switched with `set_adapter` or `disable_adapter`: under DeepSpeed both drop
gradients silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain_api.reasons import Reason
from posttrain_api.trainer import LoraConfig
from posttrain_trainer.adapters import put_on
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.lazy import Lazy

ALL_LINEAR = "all-linear"
peft = Lazy("peft")
POLICY = "default"
"""peft's name for the first adapter of a model, and the policy's role where another shares its base."""


def add_adapter(model: nn.Module, config: LoraConfig, seed: int, *, scores: bool = False) -> nn.Module:
    """The model with a new adapter, drawn from `seed` alike on every rank. TrainerFailure where a name matches no
    module, or one whose weights another has too. `scores`: a reward model, whose head is trained whole beside it.

    Adapter weights keep the base's type: ZeRO holds the fp32 masters, and mixed types break its gathers.
    """
    targets: Any = ALL_LINEAR if config.target_modules == (ALL_LINEAR,) else list(config.target_modules)
    if targets != ALL_LINEAR:
        _check_names(model, targets)
    settings = _settings(config, targets, "SEQ_CLS" if scores else "CAUSAL_LM")  # peft adds the head to modules_to_save
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted: nn.Module = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            raise _misfit(f"{list(config.target_modules)} does not fit this model ({error})") from error
    _check_tied(adapted)
    return adapted


def add_to_body(body: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """As `add_adapter`, on a model's body. Names of layers outside it are left out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings: Any = _settings(config, _inside(body, config))
        adapted: nn.Module = peft.get_peft_model(body, settings, autocast_adapter_dtype=False)
    return adapted


def add_second(adapted: Any, name: str, config: LoraConfig, seed: int) -> None:
    """One more adapter, on the body of a model that has one. Both learn; the first is active, and `adapter_scope` the
    only way to the other."""
    settings = _settings(config, _inside(adapted.get_base_model().base_model, config))
    learning = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    before = {id(parameter) for parameter in adapted.parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted.add_adapter(name, settings, autocast_adapter_dtype=False)
    for parameter in [*learning, *(each for each in adapted.parameters() if id(each) not in before)]:
        parameter.requires_grad_(True)  # peft leaves it to the active adapter


@contextmanager
def adapter_scope(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside it this adapter answers, or, None, the base alone. peft's own switches touch `requires_grad`, and
    DeepSpeed then drops gradients silently; this one touches nothing else. Forward and backward belong into one scope:
    with gradient checkpointing the backward computes the forward again, with what is active then."""
    adapted = peft.tuners.tuners_utils.BaseTunerLayer
    layers: list[Any] = [module for module in model.modules() if isinstance(module, adapted)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        layer._active_adapter = layer._active_adapter if name is None else [name]
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def _settings(config: LoraConfig, targets: Any, task: str | None = None) -> Any:
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=targets,
        task_type=task,
    )


def _inside(body: nn.Module, config: LoraConfig) -> Any:
    """The targets that are in the body: an adapter on a language model's head is no business of the critic's."""
    if config.target_modules == (ALL_LINEAR,):
        return ALL_LINEAR
    names = [name for name, _ in body.named_modules()]
    found = [each for each in config.target_modules if any(f".{name}".endswith(f".{each}") for name in names)]
    if not found:
        raise _misfit(f"{list(config.target_modules)} names no module of the critic's body")
    return found


def continue_adapter(model: nn.Module, config: LoraConfig, folder: Path) -> nn.Module:
    """The model with the adapter in `folder`, to be trained further: with its own rank, scale and layers, and this
    job's dropout. TrainerFailure where it does not fit."""
    settings = peft.PeftConfig.from_pretrained(folder)
    settings.lora_dropout = config.dropout
    adapted: nn.Module = put_on(model, folder, settings, trainable=True)
    _check_tied(adapted)
    return adapted


def _check_names(model: nn.Module, targets: list[str]) -> None:
    """peft is content when one of the names is there."""
    modules = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in modules):
            raise _misfit(f"no module of this model is called {target!r}")


def _check_tied(adapted: Any) -> None:
    """An adapter merged into one of two tied weights would change the other too: a model that was never trained."""
    base = adapted.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if None in ends:
        return  # a reward model has no such pair
    if ends[0].weight is ends[1].weight and any(isinstance(end, peft.tuners.lora.LoraLayer) for end in ends):
        raise _misfit("input and output embeddings of this model are tied, neither can have an adapter of its own")


def _misfit(what: str) -> TrainerFailure:
    return TrainerFailure(
        Reason.MODEL_INCOMPATIBLE,
        f"spec.lora.targetModules: {what}. Name linear layers of the model's body, or use [{ALL_LINEAR}].",
    )


def adapter_size(model: nn.Module, rank: int, *, dora: bool = False) -> int:
    """Σ r·(d_in + d_out) over the adapted linear layers, and d_out more with DoRA: what the number of trainable
    parameters must be."""
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    sizes = [rank * (layer.in_features + layer.out_features) + dora * layer.out_features for layer in layers]
    return sum(sizes)
