"""What the tables of accepted and refused jobs are made of: the smallest job, changes to it, and a refused one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REMOVE = object()
LONGEST = "a" + "b" * 49
COMMIT = "0123456789abcdef0123456789abcdef01234567"

BASE: dict[str, Any] = {
    "apiVersion": "posttrain.dev/v1alpha1",
    "kind": "PostTrainingJob",
    "metadata": {"name": "my-job", "namespace": "default"},
    "spec": {
        "stage": "SFT",
        "model": {"uri": "hf://Qwen/Qwen2.5-1.5B-Instruct"},
        "data": {"train": [{"uri": "pvc://datasets/gsm8k/train.jsonl"}]},
        "lora": {"rank": 16},
        "storage": {"claimName": "runs"},
    },
}


def job(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The smallest job with values set, or removed, at dotted paths."""
    manifest = copy.deepcopy(BASE)
    for path, value in changes.items():
        node: Any = manifest
        *parents, last = path.split(".")
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if isinstance(node, list):
            node[int(last)] = value
        elif value is REMOVE:
            node.pop(last, None)
        else:
            node[last] = copy.deepcopy(value)
    return manifest


@dataclass(frozen=True)
class Refused:
    """A change that both must refuse: `path` as parse_job says it, `text` in both messages."""

    name: str
    changes: Mapping[str, Any]
    path: str
    text: str
