"""The generators of a rank: saved with every checkpoint, restored by every resume. Used by checkpoint and loop."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from posttrain_trainer.runtime import seed_all


def random_state() -> dict[str, Any]:
    """Every generator of this process, in types that torch.load(weights_only=True) takes."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
    }


def restore_random(state: dict[str, Any]) -> None:
    """Sets every generator of this process."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))


def seed_anew(seed: int, step: int, rank: int) -> None:
    """For a rank that goes on with what other ranks have saved: a function of the job's seed, the step and the rank."""
    seed_all(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))
