"""Packed into one line, sequences never see each other, and score as they do alone: on every shape and attention
kernel that can be had on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from trainer_kit import Shape

from posttrain_trainer.microbatch import MicroBatch, collate
from posttrain_trainer.packing import NAME, packs, use_packed_attention
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


@pytest.fixture(
    scope="module",
    params=[f"{family}-{attention}" for family in ("Llama", "Qwen3") for attention in ("sdpa", "eager", NAME)],
)
def model(request: pytest.FixtureRequest) -> Any:
    family, attention = request.param.split("-")
    torch.manual_seed(0)
    given = "sdpa" if attention == NAME else attention
    made = transformers.AutoModelForCausalLM.from_config(
        _config(family), attn_implementation=given, dtype=torch.float32
    )
    if attention == NAME:
        assert use_packed_attention(Scorer(made))
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


def test_packed_scores_are_those_of_each_alone(model: Any) -> None:
    """Scores and gradients: one line of all sequences, against a line for each."""
    scorer = Scorer(model)
    scored = []
    for micros in ([collate([row], packed=True) for row in _rows()], [collate(_rows(), packed=True)]):
        model.zero_grad()
        logps = [scorer(*scorer.inputs(micro))[0] for micro in micros]
        torch.cat(logps).sum().backward()
        scored.append((torch.cat(logps).detach(), *[each.grad.clone() for each in model.parameters()]))
    for one, other in zip(*scored, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_packed_scores_are_the_padded_ones() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(Shape().config(), dtype=torch.float32)
    scorer = Scorer(model)
    padded = scorer(*scorer.inputs(collate(_rows())))[0]
    assert use_packed_attention(scorer)
    torch.testing.assert_close(scorer(*scorer.inputs(collate(_rows(), packed=True)))[0], padded, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize(
    ("attention", "device", "packed"),
    [
        ("SDPA", "cpu", True),
        ("SDPA", "cuda", False),
        ("Eager", "cpu", False),
    ],
)
def test_the_kernel_chooses(attention: str, device: str, packed: bool) -> None:
    model = transformers.AutoModelForCausalLM.from_config(Shape().config())
    assert packs(Scorer(model), attention, torch.device(device)) is packed
    assert (model.config._attn_implementation == NAME) is packed


@pytest.mark.parametrize("what", ["windows", "softcap"])
def test_more_than_causal_attention_stays_padded(what: str) -> None:
    """Mistral's windows and Gemma's soft caps: nothing is set, and the model is as it was."""
    given = Shape().config().to_dict()
    shape = {name: given[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.MistralConfig(**shape, sliding_window=4)
    if what == "softcap":
        config = transformers.Gemma2Config(**shape, attn_logit_softcapping=20.0, layer_types=["full_attention"] * 2)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    assert not packs(Scorer(model), "SDPA", torch.device("cpu"))
    assert model.config._attn_implementation == "eager"
    assert model(input_ids=torch.arange(4)[None]).logits.shape == (1, 4, shape["vocab_size"])
