"""What the collector asks of a rollout engine, and what it gets: token ids in, token ids out.

A text round trip would break log-probabilities. An engine draws every sample from its own seed, so that the result
depends neither on how samples lie on ranks nor on what is generated beside them, and leaves the model and the
process's random generators as it found them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """logits/temperature, then the top_k most probable (0: all), then the smallest set with mass top_p. stops: token
    ids that end a completion; they are part of it."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """One completion to be sampled. prompt int32 [p]; seed: of this sample alone, 64 bits."""

    prompt: NDArray[np.int32]
    seed: int


@dataclass(frozen=True)
class Sample:
    """tokens int32 [n ≥ 1], with the stop token that ended it; logprobs float32 [n]: log p of each under
    logits/temperature, before top_k and top_p; finish: Stop, or Length where max_new_tokens ended it; version: of the
    weights it was sampled with."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finish: Literal["Stop", "Length"]
    version: int


Stopping = Callable[[], bool]
"""Whether the ranks agreed to stop: a collective call, equally often on every rank."""


class Rollout(Protocol):
    """A rollout engine of one rank."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, version: int, stopping: Stopping
    ) -> list[Sample] | None:
        """One sample per request, in order; [] is allowed. All ranks call it together, with any number of requests
        each. None where the ranks agreed to stop. TrainerFailure(RolloutError) where a request failed."""


def seed_of(*parts: int) -> int:
    """One number of 64 bits from several: (training.seed, step, prompt, k) of a sample. The finaliser of splitmix64
    after each part."""
    state = 0
    for part in parts:
        state = _mix((state ^ (part & _MASK)) & _MASK)
    return state


_MASK = 2**64 - 1


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
