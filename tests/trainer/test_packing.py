"""Packed into one line, sequences never see each other, and score as they do alone: on every shape and attention
kernel that can be had on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from trainer_kit import Shape

from posttrain_trainer import batching
from posttrain_trainer.batching import packs
from posttrain_trainer.microbatch import MicroBatch, collate
from posttrain_trainer.score_model import ScoreModel
from posttrain_trainer.scorer import Scorer
from posttrain_trainer.tokenset import Example, TrainingRow

LENGTHS = (7, 2, 12, 3, 2, 9)


def _config(family: str) -> Any:
    llama = Shape().config()
    if family == "Llama":
        return llama
    given = {name: getattr(llama, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "eos_token_id")}
    return transformers.Qwen3Config(
        **given, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )


@pytest.fixture(scope="module", params=["Llama-sdpa", "Llama-eager", "Qwen3-sdpa", "Qwen3-eager"])
def model(request: pytest.FixtureRequest) -> Any:
    family, attention = request.param.split("-")
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(
        _config(family), attn_implementation=attention, dtype=torch.float32
    )
    return made.train()  # as it is trained: no dropout in these shapes


def _rows() -> list[TrainingRow]:
    generator = np.random.default_rng(2)
    return [
        TrainingRow((Example(generator.integers(3, 60, n).astype(np.int32), np.array([0] + [1] * (n - 1), "u1")),), {})
        for n in LENGTHS
    ]


@torch.no_grad()
def _hidden(model: Any, micro: MicroBatch) -> torch.Tensor:
    states = model.base_model(input_ids=micro.input_ids, position_ids=micro.positions, use_cache=False)
    return states.last_hidden_state.flatten(0, 1)


def test_packed_scores_are_the_padded_ones(model: Any) -> None:
    scorer = Scorer(model)
    scored = []
    for packed in (False, True):
        micro = collate(_rows(), packed=packed)
        logp = scorer(*scorer.inputs(micro))[0]
        model.zero_grad()
        logp.sum().backward()
        scored.append((logp.detach(), micro.by_sequence(logp.detach()), model.lm_head.weight.grad.clone()))
    for one, other in zip(*scored, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_another_document_is_never_seen(model: Any) -> None:
    """A token of one document changes its own states after it, and none of any other document's."""
    micro = collate(_rows(), whole=True, packed=True)
    before = _hidden(model, micro)
    starts = (micro.ends + 1).tolist()
    for number, end in enumerate(micro.ends.tolist()):
        start = starts[number - 1] if number else 0
        changed = micro.input_ids.clone()
        changed[0, start] = (changed[0, start] + 7) % 50 + 3
        moved = (_hidden(model, MicroBatch(**{**vars(micro), "input_ids": changed})) - before).abs().amax(-1)
        assert float(moved[start : end + 1].min()) > 1e-3
        assert float(torch.cat([moved[:start], moved[end + 1 :]]).max()) <= 1e-6


def test_a_reward_is_read_at_each_end() -> None:
    torch.manual_seed(0)
    config = Shape().config()
    config.num_labels = 1
    module = ScoreModel(transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))
    padded, packed = (module(*module.inputs(collate(_rows(), True, packed))) for packed in (False, True))
    torch.testing.assert_close(padded, packed, rtol=1e-5, atol=1e-5)


def test_the_kernel_chooses() -> None:
    assert batching.PACKED is None
    assert [packs(name) for name in ("SDPA", "Eager", "FlashAttention2")] == [False, False, True]
