"""Rollouts of other families, of adapters, of merged chains and of a base that a critic shares: what is sampled from is
what is trained."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rollout_kit import ALONE, PLAIN, Bare, joined, model_of, never, requests, tokens_of, trained
from trainer_kit import VOCABULARY

from posttrain_api.trainer import LoraConfig
from posttrain_trainer.adapters import merge_adapters
from posttrain_trainer.lora import POLICY, add_adapter, add_second
from posttrain_trainer.rollout.base import Sampling
from posttrain_trainer.rollout.continuous import ContinuousBatching
from posttrain_trainer.rollout.generate import Generate
from posttrain_trainer.score_model import ScoreHead
from posttrain_trainer.scorer import Scorer
from posttrain_trainer.value_model import CRITIC, SharedModel

SHAPE = {
    "vocab_size": VOCABULARY + 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0}
FAMILIES: dict[str, Callable[[], Any]] = {
    "Qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=8),
    "Gemma2, windows and caps": lambda: transformers.Gemma2Config(
        **SHAPE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8
    ),
    "Mistral, a window": lambda: transformers.MistralConfig(**SHAPE, sliding_window=8),
    "Granite, divided logits": lambda: transformers.GraniteConfig(**SHAPE, logits_scaling=4.0),
    "GPT2, learned positions": lambda: transformers.GPT2Config(**GPT2, eos_token_id=1),
}
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.2, target_modules=("all-linear",))


def made(config: Any) -> Any:
    attention = "eager" if config.model_type == "gemma2" else "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4.0)
    return model


def away_from_zero(model: Any, seed: int = 0) -> Any:
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed + number))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_sampled_as_it_is_trained(family: str) -> None:
    engine, asked = Bare(Scorer(made(FAMILIES[family]()))), requests(12)
    attention = engine.module.lm.config._attn_implementation
    first = Generate(engine, ALONE).generate(asked, PLAIN, 0, never)
    second = ContinuousBatching(engine, ALONE).generate(asked, PLAIN, 0, never)
    assert tokens_of(first) == tokens_of(second)
    assert engine.module.lm.config._attn_implementation == attention
    expected = trained(engine, asked, first)
    assert np.abs(joined(first) - expected).max() < 1e-4
    assert np.abs(joined(second) - expected).max() < 1e-4


@pytest.mark.parametrize("kind", [Generate, ContinuousBatching])
def test_an_adapter_counts_without_its_dropout_and_stays_apart(kind: Any) -> None:
    asked, model = requests(12), away_from_zero(add_adapter(model_of(), LORA, seed=5))
    engine = Bare(Scorer(model))
    engine.module.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    samples = kind(engine, ALONE).generate(asked, PLAIN, 0, never)
    assert np.abs(joined(samples) - trained(engine, asked, samples)).max() < 1e-5
    assert tokens_of(samples) != tokens_of(kind(Bare(Scorer(model_of())), ALONE).generate(asked, PLAIN, 0, never))
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert [name for name, each in model.named_parameters() if each.requires_grad and "lora_" not in name] == []
    assert all("lora_" not in name or each.requires_grad for name, each in model.named_parameters())


def test_a_chain_of_merged_adapters(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    model = model_of()
    for number, folder in enumerate(folders):
        away_from_zero(add_adapter(model, LORA, seed=5), seed=100 * number).save_pretrained(folder)
        model = merge_adapters(model_of(), folders[: number + 1])
    engine, asked = Bare(Scorer(away_from_zero(add_adapter(model, LORA, seed=7), seed=300))), requests(12)
    samples = Generate(engine, ALONE).generate(asked, PLAIN, 0, never)
    assert np.abs(joined(samples) - trained(engine, asked, samples)).max() < 1e-5


@pytest.mark.parametrize("kind", [Generate, ContinuousBatching])
def test_on_a_shared_base_the_policys_adapter_answers(kind: Any) -> None:
    asked = requests(12)
    alone = Bare(Scorer(away_from_zero(add_adapter(model_of(), LORA, seed=5))))
    expected = tokens_of(kind(alone, ALONE).generate(asked, PLAIN, 0, never))
    model: Any = away_from_zero(add_adapter(model_of(), LORA, seed=5))
    add_second(model, CRITIC, LORA, 9)
    for name, parameter in model.named_parameters():
        if f"lora_B.{CRITIC}" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    shared = SharedModel(model, ScoreHead(32, 1, bias=False))
    engine = Bare(shared)
    engine.scope = lambda: shared.scope(POLICY)  # type: ignore[method-assign]  # as SharedEngine's
    assert tokens_of(kind(engine, ALONE).generate(asked, PLAIN, 0, never)) == expected
    with shared.scope(CRITIC):
        assert tokens_of(kind(engine, ALONE).generate(asked, PLAIN, 0, never)) == expected
        assert shared.role == CRITIC


def test_the_environment_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = dict(os.environ)
    ContinuousBatching(Bare(Scorer(model_of())), ALONE).generate(requests(2), Sampling(2), 0, never)
    assert dict(os.environ) == before
