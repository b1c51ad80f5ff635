"""What the tests of rollouts share: a policy without DeepSpeed, requests, and the trainer's own log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from trainer_kit import VOCABULARY, Shape

from posttrain_trainer.engine_config import EngineSettings
from posttrain_trainer.microbatch import MicroBatch, collate
from posttrain_trainer.rollout.base import Request, Sample, Sampling, seed_of
from posttrain_trainer.runtime import Control
from posttrain_trainer.scorer import Scorer
from posttrain_trainer.tokenset import Example, TrainingRow

ALONE = Control(None, 1)
TINY = Shape()


@dataclass
class Bare:
    """An engine of stage 0 as far as a rollout sees it."""

    module: Any
    settings: EngineSettings = field(default_factory=lambda: EngineSettings(0, 0.0))

    def gathered(self, parameters: Any) -> Any:
        return nullcontext()

    def scope(self) -> Any:
        return nullcontext()


def never() -> bool:
    return False


def model_of(shape: Shape = TINY, seed: int = 3, **config: Any) -> Any:
    """With weights large enough that its distributions are far from uniform."""
    settings = shape.config()
    for name, value in config.items():
        setattr(settings, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="sdpa")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(6.0)
    return model


def policy(shape: Shape = TINY, seed: int = 3) -> Any:
    return Bare(Scorer(model_of(shape, seed)))


def requests(count: int, seed: int = 0, longest: int = 20) -> list[Request]:
    """Prompts of different lengths."""
    numbers = np.random.default_rng(seed)
    lengths = numbers.integers(1, longest + 1, count)
    prompts = [numbers.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]
    return [Request(prompt, seed_of(seed, number)) for number, prompt in enumerate(prompts)]


def tokens_of(samples: Sequence[Sample] | None) -> list[list[int]]:
    assert samples is not None
    return [sample.tokens.tolist() for sample in samples]


def micro_of(asked: Sequence[Request], samples: Sequence[Sample], packed: bool = False) -> MicroBatch:
    """Prompts and samples as a micro-batch of the trainer; the samples count."""
    rows = []
    for request, sample in zip(asked, samples, strict=True):
        tokens = np.concatenate([request.prompt, sample.tokens])
        mask = np.concatenate([np.zeros(len(request.prompt)), np.ones(len(sample.tokens))]).astype(np.uint8)
        rows.append(TrainingRow((Example(tokens, mask),), {}))
    return collate(rows, packed=packed)


def trained(engine: Any, asked: Sequence[Request], samples: Sequence[Sample]) -> np.ndarray:
    """log p of every sampled token, as the trainer computes it, in one line. Without dropout."""
    scorer = engine.module
    mode = scorer.training
    scorer.eval()
    with torch.no_grad():
        logp = scorer(*scorer.inputs(micro_of(asked, samples)))[0]
    scorer.train(mode)
    return np.asarray(logp)


def joined(samples: Sequence[Sample]) -> np.ndarray:
    return np.concatenate([sample.logprobs for sample in samples])


PLAIN = Sampling(max_new_tokens=16, stops=(1,))
GREEDY = Sampling(max_new_tokens=16, top_k=1, stops=(1,))
