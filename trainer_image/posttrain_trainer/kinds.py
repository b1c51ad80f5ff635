"""What a source is fetched as, and what its failures are called.

Shared by the two ways a source comes over a network (fetch.py for the hub, object_store.py for buckets), so that both
tell the same failure by the same reason.
"""

from __future__ import annotations

from typing import Literal

from posttrain_api.reasons import Reason

Kind = Literal["model", "dataset"]

NOT_FOUND: dict[Kind, Reason] = {"model": Reason.MODEL_NOT_FOUND, "dataset": Reason.DATASET_NOT_FOUND}
DENIED: dict[Kind, Reason] = {"model": Reason.MODEL_ACCESS_DENIED, "dataset": Reason.DATASET_NOT_FOUND}
"""Data have no reason of their own for it: the message says that access was denied."""

MODEL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""Of a model folder, beside its weights."""


def model_patterns(names: list[str], trust_remote_code: bool) -> list[str]:
    """Which of a model folder's files are needed: one format of the weights, and code only where it may run."""
    weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "*.bin"
    return [*MODEL_FILES, weights, *(["*.py"] if trust_remote_code else [])]
