"""Rollout engine Generate against transformers' generate and the trainer's own scorer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rollout_kit import ALONE, GREEDY, PLAIN, Bare, joined, model_of, never, policy, requests, tokens_of, trained
from trainer_kit import Shape

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.packing import NAME, use_packed_attention
from posttrain_trainer.rollout import generate as generate_module
from posttrain_trainer.rollout import turns as turns_module
from posttrain_trainer.rollout.base import Request, Sampling
from posttrain_trainer.rollout.generate import Generate, batches
from posttrain_trainer.scorer import Scorer


def plain_greedy(model: Any, request: Request, new_tokens: int, stops: list[int]) -> list[int]:
    ids = torch.from_numpy(request.prompt.astype(np.int64))[None]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=2,
    )
    return list(out[0, ids.shape[1] :].tolist())


def test_greedy_tokens_are_those_of_transformers() -> None:
    engine, asked = policy(), requests(20)
    samples = Generate(engine, ALONE).generate(asked, GREEDY, 0, never)
    model = engine.module.lm.eval()
    assert tokens_of(samples) == [plain_greedy(model, request, 16, [1]) for request in asked]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_trainers(temperature: float) -> None:
    engine = Bare(Scorer(model_of(), temperature))
    asked = requests(20)
    samples = Generate(engine, ALONE).generate(asked, Sampling(16, temperature, stops=(1,)), 0, never)
    assert samples is not None
    assert len({len(sample.tokens) for sample in samples}) > 1  # some have ended early
    engine.module.eval()
    assert np.abs(joined(samples) - trained(engine, asked, samples)).max() < 1e-5


def test_a_sample_is_the_same_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = policy(), requests(20)
    together = tokens_of(Generate(engine, ALONE).generate(asked, PLAIN, 0, never))
    assert len({tuple(tokens) for tokens in together}) > 10
    backwards = tokens_of(Generate(engine, ALONE, budget=100).generate(asked[::-1], PLAIN, 0, never))
    assert backwards[::-1] == together
    assert tokens_of(Generate(engine, ALONE).generate(asked[7:8], PLAIN, 0, never)) == together[7:8]
    monkeypatch.setattr(generate_module, "MAX_ROWS", 3)
    assert tokens_of(Generate(engine, ALONE).generate(asked, PLAIN, 0, never)) == together


def test_the_same_prompt_with_other_seeds_gives_other_samples() -> None:
    prompt = requests(1)[0].prompt
    samples = Generate(policy(), ALONE).generate([Request(prompt, seed) for seed in range(8)], PLAIN, 0, never)
    assert len({tuple(tokens) for tokens in tokens_of(samples)}) > 1


def test_each_stop_ends_a_completion_and_is_its_last_token() -> None:
    engine, asked = policy(), requests(40)
    free = tokens_of(Generate(engine, ALONE).generate(asked, Sampling(16), 0, never))
    stops = (free[0][3], free[1][5], 1)
    samples = Generate(engine, ALONE).generate(asked, Sampling(16, stops=stops), 4, never)
    assert samples is not None
    for sample, whole in zip(samples, free, strict=True):
        ends = [place for place, token in enumerate(whole) if token in stops]
        assert sample.tokens.tolist() == whole[: ends[0] + 1 if ends else 16]
        assert sample.finish == ("Stop" if ends else "Length")
        assert sample.version == 4
        assert (sample.tokens.dtype, sample.logprobs.dtype) == (np.int32, np.float32)
        assert len(sample.logprobs) == len(sample.tokens)
    assert {sample.finish for sample in samples} == {"Stop", "Length"}


def test_without_stops_every_completion_has_max_new_tokens() -> None:
    samples = Generate(policy(), ALONE).generate(requests(5), Sampling(9), 0, never)
    assert samples is not None
    assert [(len(sample.tokens), sample.finish) for sample in samples] == [(9, "Length")] * 5


def test_no_requests_no_samples() -> None:
    assert Generate(policy(), ALONE).generate([], PLAIN, 0, never) == []


def test_batches_keep_to_the_budget() -> None:
    asked = requests(50)
    found = list(batches(asked, 10, 100))
    assert sorted(number for batch in found for number in batch) == list(range(50))
    lengths = [[len(asked[number].prompt) for number in batch] for batch in found]
    assert all(len(batch) * (max(batch) + 10) <= 100 for batch in lengths)
    assert max(map(len, found)) > 1
    assert [len(batch) for batch in batches(asked, 10, 1)] == [1] * 50


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "its prompt has no tokens"),
        ([5, 64], "token 64, the model's are 0 to 63"),
        ([-1], "token -1, the model's are 0 to 63"),
        ([5] * 113, "113 tokens; with rollout.maxNewTokens 16 that is 129, and the model has 128 positions"),
    ],
)
def test_a_prompt_that_the_model_cannot_take_is_refused(prompt: list[int], said: str) -> None:
    asked = [*requests(2), Request(np.array(prompt, dtype=np.int32), 0)]
    with pytest.raises(TrainerFailure, match="request 2 of this rank") as caught:
        Generate(policy(), ALONE).generate(asked, PLAIN, 0, never)
    assert caught.value.reason is Reason.ROLLOUT_ERROR
    assert said in caught.value.message


def test_the_longest_prompt_that_fits_is_taken() -> None:
    asked = [Request(np.full(112, 5, dtype=np.int32), 0)]
    samples = Generate(policy(), ALONE).generate(asked, Sampling(16), 0, never)
    assert [len(tokens) for tokens in tokens_of(samples)] == [16]


def test_weights_that_are_no_numbers_are_named() -> None:
    engine = policy()
    with torch.no_grad():
        engine.module.lm.lm_head.weight[7, 3] = torch.nan
    with pytest.raises(TrainerFailure, match="not finite after 0 tokens") as caught:
        Generate(engine, ALONE).generate(requests(2), PLAIN, 0, never)
    assert caught.value.reason is Reason.NON_FINITE


def test_it_stops_where_the_ranks_agreed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "SECONDS", 0.0)
    asked: list[int] = []

    def stopping() -> bool:
        asked.append(1)
        return len(asked) == 4

    engine = policy()
    assert Generate(engine, ALONE).generate(requests(4), Sampling(50), 0, stopping) is None
    assert len(asked) == 4
    assert engine.module.training


def test_stopping_is_asked_in_a_short_rollout_too() -> None:
    assert Generate(policy(), ALONE).generate([], PLAIN, 0, lambda: True) is None


def test_modes_generators_and_attention_are_as_before() -> None:
    engine = policy(Shape(attention_dropout=0.5))
    assert use_packed_attention(engine.module)
    engine.module.train()
    engine.module.lm.model.layers[1].eval()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    asked = requests(8)
    samples = Generate(engine, ALONE).generate(asked, PLAIN, 0, never)
    assert torch.rand(3).equal(expected)
    assert engine.module.training
    assert engine.module.lm.model.layers[0].training
    assert not engine.module.lm.model.layers[1].training
    assert engine.module.lm.config._attn_implementation == NAME
    assert all(parameter.requires_grad for parameter in engine.module.parameters())
    assert torch.is_grad_enabled()
    plain = Bare(Scorer(model_of(Shape(attention_dropout=0.5))))
    assert tokens_of(samples) == tokens_of(Generate(plain, ALONE).generate(asked, PLAIN, 0, never))


def test_the_modes_come_back_after_an_error_too() -> None:
    engine = policy()
    engine.module.train()
    with pytest.raises(TrainerFailure):
        Generate(engine, ALONE).generate([Request(np.array([], dtype=np.int32), 0)], PLAIN, 0, never)
    assert engine.module.training
    assert torch.is_grad_enabled()
