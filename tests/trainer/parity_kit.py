"""TRL's trainers beside our objectives: the same weights, the same text, and both sides' loss, gradients and metrics.

TRL's side is in parity_trl. Ours is the scorer (or the score model), the algorithm and the arithmetic of the loop,
without an engine. The text is words of a small vocabulary, so that its tokens are known without asking either side.
"""

from __future__ import annotations

import copy
import importlib.metadata
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from posttrain_trainer.microbatch import MicroBatch, collate
from posttrain_trainer.objective import Tally, local_weights, scaled, weights_of
from posttrain_trainer.runtime import Control
from posttrain_trainer.score_model import set_head
from posttrain_trainer.scorer import Scorer
from posttrain_trainer.tokenset import Example, TrainingRow

TRL = f"trl {importlib.metadata.version('trl')}"
"""The version that these tests hold for; it is part of their names."""
WORDS, PAD, EOS = 61, 0, 1
LOSS, GRADIENT = 1e-6, 1e-5
"""Relative, in fp32: what sums of a few hundred numbers in another order differ by, and no formula does."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny, and the processors are shared: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def named(value: Any) -> str:
    """A test's id with TRL's version in it."""
    return f"{value}, {TRL}"


@dataclass(frozen=True)
class Pair:
    """Token ids; every answer ends with EOS."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float = 0.0


def pairs(count: int, seed: int = 0) -> list[Pair]:
    """Pairs of mixed lengths. The first has an empty chosen answer (its EOS alone), the second equal answers."""
    random_ = random.Random(seed)

    def words(least: int, most: int) -> tuple[int, ...]:
        return tuple(random_.randrange(2, WORDS) for _ in range(random_.randint(least, most)))

    made = [Pair(words(1, 6), (*words(0, 9), EOS), (*words(0, 9), EOS), random_.random()) for _ in range(count)]
    made[0] = replace(made[0], chosen=(EOS,))
    made[1] = replace(made[1], rejected=made[1].chosen)
    return made


def text(tokens: Sequence[int]) -> str:
    """What our tokenizer makes these tokens of; begins with a space, so that prompt and answer can be joined."""
    return "".join(f" {word(token)}" for token in tokens)


def word(token: int) -> str:
    return {PAD: "<pad>", EOS: "</s>"}.get(token, f"w{token:02d}")


def tokenizer(pad: str = "<pad>") -> Any:
    """Words between spaces. No BOS: TRL's side adds none then, and neither does the rows' maker."""
    import tokenizers
    import transformers

    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word(token): token for token in range(WORDS)}, unk_token="w02")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token=pad, unk_token="w02"
    )


def config() -> Any:
    """Llama-shaped, with grouped heads, no dropout."""
    import transformers

    return transformers.LlamaConfig(
        vocab_size=WORDS + 3,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # so that the log-probabilities of tokens differ by much, as a trained model's do
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def language_model(seed: int) -> Any:
    import transformers

    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config(), dtype=torch.float32)


def classifier(seed: int) -> Any:
    """A body of the same shape with our head, whose weights are drawn by us: both sides begin with them."""
    import transformers

    shape = config()
    shape.num_labels = 1
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(shape, dtype=torch.float32)
    set_head(model, seed, draw=True)
    return model


def example(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    tokens = np.array([*prompt, *answer], dtype=np.int32)
    mask = np.array([0] * len(prompt) + [1] * len(answer), dtype=np.uint8)
    mask[0] = 0
    return Example(tokens, mask)


def pair_rows(given: Sequence[Pair]) -> list[TrainingRow]:
    return [
        TrainingRow((example(pair.prompt, pair.chosen), example(pair.prompt, pair.rejected)), {"margin": pair.margin})
        for pair in given
    ]


def with_reference(micro: MicroBatch, reference: nn.Module) -> MicroBatch:
    """The reference's own log-probabilities, by our scorer."""
    with torch.no_grad():
        scorer = Scorer(copy.deepcopy(reference))
        logp, _, _ = scorer(*scorer.inputs(micro))
    return replace(micro, values={**micro.values, "reference": micro.by_sequence(logp)})


@dataclass(frozen=True)
class Side:
    """One side's result; gradients by the parameter's name in transformers."""

    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def ours(algorithm: Any, module: nn.Module, micros: Sequence[MicroBatch]) -> Side:
    """A step up to its gradients, by the loop's own arithmetic. module: a scorer or score model around the model."""
    module.zero_grad()
    weights = weights_of(algorithm, local_weights(algorithm, micros))
    tally = Tally(algorithm)
    for micro in micros:
        losses = tally.add(module(*module.inputs(micro)), micro)
        scaled(losses, algorithm.terms, weights, 1).backward()
    metrics, _ = tally.reduce(Control(None, 1), weights)
    return Side(metrics["loss"], gradients(module.lm), metrics)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def assert_same(ours: Side, theirs: Side) -> None:
    """Loss to 1e-6; the whole gradient, and each parameter's where it is not negligible, to 1e-5."""
    assert abs(ours.loss - theirs.loss) <= LOSS * max(1.0, abs(theirs.loss))
    assert ours.gradients.keys() == theirs.gradients.keys()
    norm = _norm(theirs.gradients)
    assert norm > 1e-3  # there is something to compare
    difference = {name: ours.gradients[name] - wanted for name, wanted in theirs.gradients.items()}
    assert _norm(difference) <= GRADIENT * norm
    for name, wanted in theirs.gradients.items():
        assert float(difference[name].norm()) <= GRADIENT * max(float(wanted.norm()), 0.01 * norm), name


def assert_metrics(ours: Side, theirs: Side, names: Sequence[str]) -> None:
    for name in names:
        assert abs(ours.metrics[name] - theirs.metrics[name]) <= 1e-5 * max(1.0, abs(theirs.metrics[name])), name


def _norm(given: dict[str, Tensor]) -> float:
    return float(torch.cat([each.flatten() for each in given.values()]).norm())


def micros(rows: Sequence[TrainingRow], whole: bool = False) -> list[MicroBatch]:
    """In two micro-batches of unequal size: the result must not show it."""
    return [collate(rows[:3], whole), collate(rows[3:], whole)]
