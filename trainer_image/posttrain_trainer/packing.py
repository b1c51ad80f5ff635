"""Whether micro-batches are packed, and attention over a packed line: each sequence by itself, with torch's own kernel.

Called by assemble for every model that it makes. A packed line has no padding, but transformers' plain SDPA gives it a
dense mask of T × T; here the line is split where the positions begin again, and each part is plain causal attention. On
a CPU that is half as fast again as padded micro-batches of similar length. A model that asks for more than causal
attention (windows, sinks, soft caps), or does not say where sequences begin, stays padded.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from posttrain_trainer.scorer import causal_lm

log = logging.getLogger(__name__)

NAME = "packed_sdpa"
PACKED: bool | None = None
"""None: where it is faster. Tests set it: the result is the same."""
_UNKNOWN = ("sliding_window", "softcap", "s_aux")


def packs(module: Any, attention: str, device: torch.device) -> bool:
    """Whether this model's micro-batches are packed; if so, its attention is made ready for it. `module`: a scorer or a
    reward model. `attention`: SDPA or Eager."""
    if PACKED is False:
        return False
    return attention == "SDPA" and (PACKED or device.type == "cpu") and use_packed_attention(module)


def use_packed_attention(module: Any) -> bool:
    """Sets the attention below on a model still on the CPU and whole. False, and nothing set, where the model would
    compute something else with it."""
    model = causal_lm(module.lm)
    before = model.config._attn_implementation
    alone = [_states(model, torch.arange(n)[None], None) for n in (3, 2)]
    try:
        model.set_attn_implementation(NAME)
        positions = torch.tensor([[0, 1, 2, 0, 1]])
        together = _states(model, positions, positions)
        if torch.allclose(torch.cat(alone, dim=1), together, rtol=1e-4, atol=1e-4) and not _windowed(model.config):
            return True
        log.info("%s: another attention than this trainer packs; micro-batches are padded", type(model).__name__)
    except (ValueError, RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        log.info("%s: micro-batches are padded (%s)", type(model).__name__, error)
    model.set_attn_implementation(before)
    return False


def _windowed(config: Any) -> bool:
    """Whether a layer sees less than all before it: two short sequences would not show it."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    return kinds != {"full_attention"}


@torch.no_grad()
def _states(model: Any, ids: Tensor, positions: Tensor | None) -> Tensor:
    training = model.training
    model.eval()
    states: Tensor = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    model.train(training)
    return states


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface. query [1, heads, T, d], key and value [1, kv heads, T, d] → [1, T, heads, d].
    NotImplementedError where a layer asks for more than causal attention."""
    asked = [name for name in _UNKNOWN if given.get(name) is not None]
    if mask is not None or asked or query.shape[0] != 1 or given.get("position_ids") is None:
        raise NotImplementedError(f"attention with {', '.join(asked) or 'a mask, several lines or no positions'}")
    starts = (given["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    sizes = [stop - start for start, stop in pairwise([*starts, query.shape[2]])]
    dropout = given.get("dropout", 0.0) if module.training else 0.0
    grouped = query.shape[1] != key.shape[1]
    scale = given.get("scaling")
    parts = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped)
        for q, k, v in zip(*(each.split(sizes, dim=2) for each in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
