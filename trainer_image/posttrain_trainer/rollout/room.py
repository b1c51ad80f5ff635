"""How many tokens a rollout may hold at a time: from the memory that is free and the model's shape.

Called by both engines.
"""

from __future__ import annotations

from typing import Any

import torch

CPU_BYTES = 2 * 2**30
"""On a CPU: what a rollout may take of the container's memory."""
FREE_SHARE = 0.5
"""On an accelerator: of the memory that is free when the rollout begins."""


def free_bytes(device: torch.device) -> int:
    """What a rollout may take."""
    if device.type != "cuda":
        return CPU_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(FREE_SHARE * (free + unused))


def bytes_per_token(model: Any) -> int:
    """Keys and values of all layers, and the widest activations of one layer while a prompt is read."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    numbers = 2 * config.num_hidden_layers * heads * head + 4 * (config.hidden_size + inner)
    return int(numbers * model.get_input_embeddings().weight.element_size())


def tokens_that_fit(model: Any) -> int:
    """At least 1."""
    return max(1, free_bytes(model.get_input_embeddings().weight.device) // bytes_per_token(model))
