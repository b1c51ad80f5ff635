"""What one engine alone does: Generate's batches, ContinuousBatching's paged cache and what its library may say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rollout_kit import ALONE, PLAIN, Bare, joined, model_of, never, policy, requests, tokens_of, trained
from transformers.generation.continuous_batching import continuous_api

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.rollout import continuous as continuous_module
from posttrain_trainer.rollout import generate as generate_module
from posttrain_trainer.rollout.base import Request, Sampling
from posttrain_trainer.rollout.continuous import ContinuousBatching
from posttrain_trainer.rollout.generate import Generate, batches
from posttrain_trainer.rollout.room import bytes_per_token, tokens_that_fit
from posttrain_trainer.scorer import Scorer


def test_batches_keep_to_the_budget() -> None:
    asked = requests(50)
    found = list(batches(asked, 10, 100))
    assert sorted(number for batch in found for number in batch) == list(range(50))
    lengths = [[len(asked[number].prompt) for number in batch] for batch in found]
    assert all(len(batch) * (max(batch) + 10) <= 100 for batch in lengths)
    assert max(map(len, found)) > 1
    assert [len(batch) for batch in batches(asked, 10, 1)] == [1] * 50


def test_batches_keep_to_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_module, "MAX_ROWS", 3)
    assert [len(batch) for batch in batches(requests(7), 10, 10**6)] == [3, 3, 1]


def test_rows_that_have_ended_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = policy(), requests(30)
    rows: list[int] = []
    draw = generate_module.draw
    monkeypatch.setattr(generate_module, "draw", lambda logits, *rest: rows.append(len(logits)) or draw(logits, *rest))
    samples = Generate(engine, ALONE).generate(asked, Sampling(60, stops=tuple(range(0, 64, 8))), 0, never)
    assert samples is not None
    assert np.abs(joined(samples) - trained(engine, asked, samples)).max() < 1e-5
    assert rows[0] == 30
    assert rows == sorted(rows, reverse=True)
    assert len(rows) == max(len(sample.tokens) for sample in samples)
    alive = [sum(len(sample.tokens) > step for sample in samples) for step in range(len(rows))]
    assert all(there < 2 * alive_ or there == 1 for there, alive_ in zip(rows, alive, strict=True))


def test_the_room_for_a_token() -> None:
    # fp32: 2 layers of 2 kv heads of 8, keys and values; 4 · (32 + 64) activations.
    assert bytes_per_token(model_of()) == 4 * (2 * 2 * 2 * 8 + 4 * (32 + 64))
    assert tokens_that_fit(model_of()) == 2 * 2**30 // bytes_per_token(model_of())


def long_requests() -> list[Request]:
    """Four prompts of three pages each, the same two at a time."""
    numbers = np.random.default_rng(5)
    prompts = [numbers.integers(3, 61, 96).astype(np.int32) for _ in range(2)]
    return [Request(prompts[number % 2], number) for number in range(4)]


def test_the_next_rollout_uses_the_new_weights() -> None:
    assert stale_difference() < 1e-5


def test_a_kept_cache_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails where the library's manager lives on: it shares blocks with the old weights' prompts."""
    made: list[Any] = []
    create = continuous_api.ContinuousBatchingManager._create_batch_processor

    def keep(manager: Any) -> Any:
        if not made:
            made.append((manager, create(manager)))
        old, processor = made[0]
        processor.input_queue = manager.input_queue
        manager.output_router = processor.output_router
        old.batch_processor = processor
        create(old)  # resets it, as the library does between two sessions
        return processor

    monkeypatch.setattr(continuous_api.ContinuousBatchingManager, "_create_batch_processor", keep)
    assert stale_difference(update=0.0) < 1e-5
    made.clear()
    assert stale_difference() > 0.1


def stale_difference(update: float = 0.3) -> float:
    """Between the two log-probabilities of a token, after a rollout, an update, and the same prompts once more."""
    engine, asked = policy(), long_requests()
    ContinuousBatching(engine, ALONE).generate(asked, PLAIN, 0, never)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.add_(update * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    samples = ContinuousBatching(engine, ALONE).generate(asked, PLAIN, 1, never)
    assert samples is not None
    return float(np.abs(joined(samples) - trained(engine, asked, samples)).max())


def test_a_request_that_lost_its_place_goes_on_with_its_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache too small for all: the library throws requests out, and reads them again later as longer prompts."""
    engine, asked = policy(), requests(12)
    sampling = Sampling(80, stops=(1,))
    expected = tokens_of(Generate(engine, ALONE).generate(asked, sampling, 0, never))
    moved: list[bool] = []
    draw = continuous_module._Asked.draw

    def watch(work: Any, states: Any, scores: Any) -> Any:
        moved.extend(bool(state._true_initial_tokens) for state in states)
        return draw(work, states, scores)

    monkeypatch.setattr(continuous_module._Asked, "draw", watch)
    samples = ContinuousBatching(engine, ALONE, budget=300).generate(asked, sampling, 0, never)
    assert any(moved)
    assert tokens_of(samples) == expected
    assert np.abs(joined(samples) - trained(engine, asked, samples)).max() < 1e-5


def test_a_prompt_may_be_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = policy(), long_requests()
    expected = tokens_of(Generate(engine, ALONE).generate(asked, PLAIN, 0, never))
    monkeypatch.setattr(continuous_module, "MAX_BATCH_TOKENS", 40)
    assert tokens_of(ContinuousBatching(engine, ALONE).generate(asked, PLAIN, 0, never)) == expected


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "request 1 of this rank: it was never answered"),
        (SimpleNamespace(error="boom", generated_tokens=[5], logprobs=[-1.0]), "it failed (boom)"),
        (SimpleNamespace(error=None, generated_tokens=[], logprobs=[]), "it failed (no tokens)"),
    ],
)
def test_an_answer_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch, answer: Any, said: str) -> None:
    outputs = continuous_module._outputs

    def spoil(*given: Any) -> dict[str, Any]:
        found = outputs(*given)
        found.pop("1")
        return found if answer is None else {**found, "1": answer}

    monkeypatch.setattr(continuous_module, "_outputs", spoil)
    with pytest.raises(TrainerFailure) as caught:
        ContinuousBatching(policy(), ALONE).generate(requests(3), PLAIN, 0, never)
    assert caught.value.reason is Reason.ROLLOUT_ERROR
    assert said in caught.value.message


def test_an_error_of_the_model_is_raised_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = policy()

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(engine.module.lm.model.layers[1], "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        ContinuousBatching(engine, ALONE).generate(requests(3), PLAIN, 0, never)
    assert engine.module.training
    assert engine.module.lm.config._attn_implementation == "sdpa"


def test_a_model_that_it_cannot_run_is_named() -> None:
    model = model_of()
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(TrainerFailure, match=r"LlamaForCausalLM.*Set rollout\.engine to Generate") as caught:
        ContinuousBatching(Bare(Scorer(model)), ALONE).generate(requests(3), PLAIN, 0, never)
    assert caught.value.reason is Reason.ROLLOUT_ERROR
