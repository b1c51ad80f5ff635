"""Both rollout engines against transformers' generate, the trainer's own scorer, and each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from rollout_kit import ALONE, GREEDY, PLAIN, Bare, joined, model_of, never, policy, requests, tokens_of, trained
from trainer_kit import Shape

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.packing import NAME, use_packed_attention
from posttrain_trainer.rollout import turns as turns_module
from posttrain_trainer.rollout.base import Request, Sampling
from posttrain_trainer.rollout.continuous import ContinuousBatching
from posttrain_trainer.rollout.generate import Generate
from posttrain_trainer.rollout.policy import lent
from posttrain_trainer.scorer import Scorer

Kind = Callable[..., Any]
both = pytest.mark.parametrize("kind", [Generate, ContinuousBatching])


def plain_greedy(model: Any, request: Request, stops: list[int]) -> list[int]:
    """What transformers alone says, one request at a time."""
    ids = torch.from_numpy(request.prompt.astype(np.int64))[None]
    ends = {"eos_token_id": stops, "pad_token_id": 2}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, **ends)
    return list(out[0, ids.shape[1] :].tolist())


@both
def test_greedy_tokens_are_those_of_transformers(kind: Kind) -> None:
    engine, asked = policy(), requests(20)
    samples = kind(engine, ALONE).generate(asked, GREEDY, 0, never)
    model = engine.module.lm.eval()
    assert tokens_of(samples) == [plain_greedy(model, request, [1]) for request in asked]


@both
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_trainers(kind: Kind, temperature: float) -> None:
    engine, asked = Bare(Scorer(model_of(), temperature)), requests(20)
    samples = kind(engine, ALONE).generate(asked, Sampling(16, temperature, stops=(1,)), 0, never)
    assert samples is not None
    assert len({len(sample.tokens) for sample in samples}) > 1  # some have ended early
    assert np.abs(joined(samples) - trained(engine, asked, samples)).max() < 1e-5


@both
def test_log_probabilities_in_bf16(kind: Kind) -> None:
    """Attention over other shapes rounds otherwise; the head adds nothing to that, it is in fp32."""
    engine, asked = policy(), requests(40)
    for parameter in engine.module.parameters():
        parameter.data = parameter.data.bfloat16()
    samples = kind(engine, ALONE).generate(asked, PLAIN, 0, never)
    difference = np.abs(joined(samples) - trained(engine, asked, samples))
    assert difference.max() < 0.05
    assert difference.mean() < 4e-3
    with lent(engine) as model:
        hidden = torch.randn(3, 32).bfloat16()
        logits = model.lm_head(hidden)
        assert logits.dtype == torch.float32
        assert torch.allclose(logits, hidden.float() @ model.lm_head.weight.float().T, atol=1e-5)
    assert engine.module.lm.lm_head(hidden).dtype == torch.bfloat16


def test_both_engines_draw_the_same() -> None:
    engine, asked = policy(), requests(20)
    for sampling in (PLAIN, Sampling(16, 0.7, top_k=5, top_p=0.9, stops=(1, 5))):
        samples = [kind(engine, ALONE).generate(asked, sampling, 0, never) for kind in (Generate, ContinuousBatching)]
        assert tokens_of(samples[0]) == tokens_of(samples[1])
        assert np.abs(joined(samples[0]) - joined(samples[1])).max() < 1e-5


@both
def test_a_sample_is_the_same_in_any_company(kind: Kind) -> None:
    engine, asked = policy(), requests(20)
    together = tokens_of(kind(engine, ALONE).generate(asked, PLAIN, 0, never))
    assert len({tuple(tokens) for tokens in together}) > 10
    backwards = tokens_of(kind(engine, ALONE, budget=100).generate(asked[::-1], PLAIN, 0, never))
    assert backwards[::-1] == together
    assert tokens_of(kind(engine, ALONE).generate(asked[7:8], PLAIN, 0, never)) == together[7:8]


@both
def test_the_same_prompt_with_other_seeds_gives_other_samples(kind: Kind) -> None:
    prompt = requests(1)[0].prompt
    asked = [Request(prompt, seed) for seed in [*range(8), 2**64 - 1, 0]]
    found = tokens_of(kind(policy(), ALONE).generate(asked, PLAIN, 0, never))
    assert len({tuple(tokens) for tokens in found}) > 5
    assert found[-1] == found[0]


@both
def test_each_stop_ends_a_completion_and_is_its_last_token(kind: Kind) -> None:
    engine, asked = policy(), requests(40)
    free = tokens_of(kind(engine, ALONE).generate(asked, Sampling(16), 0, never))
    assert {len(tokens) for tokens in free} == {16}
    stops = (free[0][3], free[1][5], 1)
    samples = kind(engine, ALONE).generate(asked, Sampling(16, stops=stops), 4, never)
    assert samples is not None
    for sample, whole in zip(samples, free, strict=True):
        ends = [place for place, token in enumerate(whole) if token in stops]
        assert sample.tokens.tolist() == whole[: ends[0] + 1 if ends else 16]
        assert sample.finish == ("Stop" if ends else "Length")
        assert sample.version == 4
        assert (sample.tokens.dtype, sample.logprobs.dtype) == (np.int32, np.float32)
        assert len(sample.logprobs) == len(sample.tokens)
    assert {sample.finish for sample in samples} == {"Stop", "Length"}


@both
def test_one_new_token_is_enough(kind: Kind) -> None:
    samples = kind(policy(), ALONE).generate(requests(5), Sampling(1), 0, never)
    assert [len(tokens) for tokens in tokens_of(samples)] == [1] * 5


@both
@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "its prompt has no tokens"),
        ([5, 64], "token 64, the model's are 0 to 63"),
        ([-1], "token -1, the model's are 0 to 63"),
        ([5] * 113, "113 tokens; with rollout.maxNewTokens 16 that is 129, and the model has 128 positions"),
    ],
)
def test_a_prompt_that_the_model_cannot_take_is_refused(kind: Kind, prompt: list[int], said: str) -> None:
    asked = [*requests(2), Request(np.array(prompt, dtype=np.int32), 0)]
    engine = policy()
    engine.module.train()
    with pytest.raises(TrainerFailure, match="request 2 of this rank") as caught:
        kind(engine, ALONE).generate(asked, PLAIN, 0, never)
    assert caught.value.reason is Reason.ROLLOUT_ERROR
    assert said in caught.value.message
    assert engine.module.training
    assert torch.is_grad_enabled()


@both
def test_the_longest_prompt_that_fits_is_taken(kind: Kind) -> None:
    asked = [Request(np.full(112, 5, dtype=np.int32), 0)]
    assert [len(tokens) for tokens in tokens_of(kind(policy(), ALONE).generate(asked, Sampling(16), 0, never))] == [16]


@both
def test_weights_that_are_no_numbers_are_named(kind: Kind) -> None:
    engine = policy()
    with torch.no_grad():
        engine.module.lm.lm_head.weight[7, 3] = torch.nan
    with pytest.raises(TrainerFailure, match="not finite after 0 tokens") as caught:
        kind(engine, ALONE).generate(requests(2), PLAIN, 0, never)
    assert caught.value.reason is Reason.NON_FINITE


@both
def test_it_stops_where_the_ranks_agreed_to(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "SECONDS", 0.0)
    engine, asked = policy(), []

    def stopping() -> bool:
        asked.append(1)
        return len(asked) == 4

    assert kind(engine, ALONE).generate(requests(4), Sampling(50), 0, stopping) is None
    assert len(asked) == 4
    assert engine.module.training


@both
def test_without_requests_it_still_takes_its_turn(kind: Kind) -> None:
    assert kind(policy(), ALONE).generate([], PLAIN, 0, never) == []
    assert kind(policy(), ALONE).generate([], PLAIN, 0, lambda: True) is None


@both
def test_modes_generators_and_attention_are_as_before(kind: Kind) -> None:
    engine = policy(Shape(attention_dropout=0.5))
    assert use_packed_attention(engine.module)
    engine.module.train()
    engine.module.lm.model.layers[1].eval()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    asked = requests(8)
    samples = kind(engine, ALONE).generate(asked, PLAIN, 0, never)
    assert torch.rand(3).equal(expected)
    assert engine.module.training
    assert engine.module.lm.model.layers[0].training
    assert not engine.module.lm.model.layers[1].training
    assert engine.module.lm.config._attn_implementation == NAME
    assert all(parameter.requires_grad for parameter in engine.module.parameters())
    assert torch.is_grad_enabled()
    assert tokens_of(samples) == tokens_of(kind(policy(), ALONE).generate(asked, PLAIN, 0, never))


@both
def test_gradient_checkpointing_is_in_no_ones_way(kind: Kind) -> None:
    engine, asked = policy(), requests(6)
    expected = tokens_of(kind(engine, ALONE).generate(asked, PLAIN, 0, never))
    engine.module.lm.activation_checkpointing_enable({"use_reentrant": False})
    engine.module.train()
    assert tokens_of(kind(engine, ALONE).generate(asked, PLAIN, 0, never)) == expected
