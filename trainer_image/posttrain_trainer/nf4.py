"""The frozen linear layers in 4 bits below the adapters: QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3).

Each block of 64 weights is divided by its largest magnitude, and each quotient rounded to the nearest of the 16 NF4
values; the magnitudes are kept in 8 bits, in blocks of 256 with a scale of their own (double quantization): 4.127 bits
a weight. A forward multiplies with the weights that these bits stand for, in the training's precision, and its gradient
goes through them to the adapters. By bitsandbytes, imported here only.
Called by model.py once the starting model is whole (chains merged, in fp32), by export.py for a merged model, by
`prepare` to ask whether this machine can do it. Embeddings and heads stay as they are. Rounding is done on the CPU, so
that every rank and the export get the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from posttrain_api.reasons import Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.errors import TrainerFailure, describe


def asked(config: TrainerConfig) -> bool:
    """Whether the job wants its frozen layers in 4 bits."""
    return config.tuning == "LoRA" and config.lora is not None and config.lora.quantization is not None


def quantize(model: Any, compute: torch.dtype) -> None:
    """Puts 4-bit layers in the places of the model's linear layers; `compute`: the type that they multiply in.
    TrainerFailure(ModelIncompatible) where there are none, (ImageIncompatible) without bitsandbytes."""
    for name, layer in _layers(model):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _stored(layer, compute))
    model.is_loaded_in_4bit = True  # peft asks this before it looks at the layers


@torch.no_grad()
def round_weights(model: Any) -> None:
    """Replaces the weights that `quantize` would store by what the 4 bits stand for, in place and in their own type."""
    bnb = _library()
    for _, layer in _layers(model):
        layer.weight.copy_(bnb.functional.dequantize_4bit(*_rounded(bnb, layer.weight)))


def check(device: str) -> None:
    """TrainerFailure(ImageIncompatible) where this machine cannot quantize and multiply on `device`."""
    layer = nn.Linear(64, 2, bias=False, device="meta")
    weight = torch.linspace(-1, 1, 128).view(2, 64)
    layer.weight = nn.Parameter(weight)
    try:
        found = _stored(layer, torch.float32).to(device)(torch.eye(64, device=device)).T
    except (RuntimeError, OSError, NotImplementedError, AttributeError) as error:
        raise _unusable(f"cannot multiply on {device}: {describe(error)}") from error
    # Half the widest gap between two NF4 values is 0.152; the scale has 8 bits.
    if not bool(((found.detach().cpu() - weight).abs() < 0.2).all()):
        raise _unusable(f"gives wrong numbers on {device}")


def elements(parameter: nn.Parameter) -> int:
    """Weights of the model that it holds: two to a byte where it is quantized."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _layers(model: Any) -> list[tuple[str, nn.Linear]]:
    """Plain linear layers but the head, by name. One that computes something of its own is left as it is."""
    head = model.get_output_embeddings()
    found = [(name, each) for name, each in _linear(model) if each is not head]
    if not found:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"spec.lora.quantization: {type(model).__name__} has no linear layers beside its head that could be kept "
            "in 4 bits. Remove it.",
        )
    return found


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            yield name, module


def _stored(layer: nn.Linear, compute: torch.dtype) -> Any:
    bnb = _library()
    biased = layer.bias is not None
    # On the meta device: its first weights would cost time and random numbers.
    stored = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=biased, compute_dtype=compute, quant_type="nf4", device="meta"
    )
    packed, state = _rounded(bnb, layer.weight.detach())
    state.dtype = compute  # of what the bits stand for; it would be that of the weight before
    stored.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", module=stored, bnb_quantized=True
    )
    stored.bias = layer.bias
    stored.quant_state = state
    # On some CPUs an evaluation would repack the weights for a bf16 kernel: other numbers than in training, and none
    # in the next step.
    stored.support_avx512bf16_for_cpu = False
    stored.register_state_dict_post_hook(_without_scales)
    stored.train(layer.training)
    return stored


def _rounded(bnb: Any, weight: Tensor) -> tuple[Tensor, Any]:
    """weight [out, in] → the packed bits, uint8 [⌈out·in / 2⌉, 1], and what they are read with."""
    try:
        packed, state = bnb.functional.quantize_4bit(
            weight.float().cpu().contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
    except (RuntimeError, OSError, NotImplementedError, AttributeError) as error:
        raise _unusable(f"cannot quantize: {describe(error)}") from error
    return packed, state


def _without_scales(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Checkpoints leave frozen weights out by their parameters' names; the scales have none."""
    for name in [name for name in state if name.startswith(prefix + "weight.")]:
        del state[name]


def _library() -> Any:
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise _unusable(f"cannot be imported: {describe(error)}") from error
    return bitsandbytes


def _unusable(what: str) -> TrainerFailure:
    return TrainerFailure(
        Reason.IMAGE_INCOMPATIBLE,
        f"spec.lora.quantization: bitsandbytes {what}. Use the operator's own trainer image, whose lock has it, or "
        "remove lora.quantization; `python -m bitsandbytes` in this image tells more.",
    )
