"""PPO against what trl 1.12's PPOTrainer computed, its last version: fixtures/ppo.json, made by fixtures/make_ppo.py.

The log-probabilities and values are the fixture's; advantages, returns, losses and gradients by them are compared.
What is meant to differ has a test here too: docs/decisions/0008.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain_api.online import PPOConfig
from posttrain_trainer.advantages import gae, whitened
from posttrain_trainer.algorithms.critic import Critic
from posttrain_trainer.algorithms.ppo import PPO
from posttrain_trainer.experience import OLD, REFERENCE, VALUE, Experience
from posttrain_trainer.microbatch import MicroBatch, collate
from posttrain_trainer.objective import Tally, local_weights, scaled, weights_of
from posttrain_trainer.policy_losses import value_loss
from posttrain_trainer.runtime import Control

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "ppo.json").read_text())
CASES: dict[str, dict[str, Any]] = FIXTURE["cases"]
VERSION = f"trl {FIXTURE['versions']['trl']}"
NEW_LOGP, NEW_VALUE = "new_logprobs", "vpred"
FULL = ("full, k1", "full, k3")
SAME = (*FULL, "mixed, no decay")
"""Where the place of the score makes no difference to advantages: without decay, or with no place after the end."""
CUT = 4
EXACT = {"rtol": 1e-5, "atol": 1e-6}
"""TRL's sums are in fp32."""


def named(case: str) -> str:
    return f"{case}, {VERSION}"


def _flat(case: dict[str, Any], name: str) -> NDArray[np.float32]:
    rows = zip(case[name], case["lengths"], strict=True)
    return np.concatenate([np.array(row[:length], dtype=np.float32) for row, length in rows])


def _settings(case: dict[str, Any], **changes: Any) -> PPOConfig:
    given = case["settings"]
    return PPOConfig(
        clip_range=given["cliprange"],
        value_clip_range=given["cliprange_value"],
        value_coefficient=given["vf_coef"],
        gamma=given["gamma"],
        lam=given["lam"],
        kl_coefficient=given["kl_coef"],
        kl_estimator=given["kl_estimator"].upper(),
        missing_eos_penalty=given["missing_eos_penalty"] or 0.0,
        **{"loss_aggregation": "Token", **changes},
    )


def _experience(case: dict[str, Any]) -> Experience:
    """The fixture's scores have the penalty in them; ours get it from the algorithm."""
    ended = np.array(case["contain_eos_token"])
    penalty = case["settings"]["missing_eos_penalty"] or 0.0
    names = {OLD: "logprobs", REFERENCE: "ref_logprobs", VALUE: "values", NEW_LOGP: NEW_LOGP, NEW_VALUE: NEW_VALUE}
    return Experience(
        prompts=tuple(np.array([4, 5], dtype=np.int32) for _ in ended),
        completions=tuple(np.arange(3, 3 + length, dtype=np.int32) for length in case["lengths"]),
        ended=ended,
        group=np.arange(len(ended)),
        rewards=(np.array(case["scores"]) + penalty * ~ended)[:, None],
        each={name: _flat(case, theirs) for name, theirs in names.items()},
    )


def _estimated(case: dict[str, Any], **changes: Any) -> tuple[Experience, Any]:
    found = _experience(case)
    estimated = PPO(_settings(case, **changes)).estimate(found, case["settings"]["kl_coef"])
    return found.having(**estimated.each), estimated


def _step(algorithm: Any, table: Experience, of: str) -> tuple[dict[str, float], Tensor]:
    """Loss and metrics, and the gradient by each token's number `of`, in micro-batches of unequal size."""
    micros = [collate([table[row] for row in rows]) for rows in (range(CUT), range(CUT, len(table)))]
    weights = weights_of(algorithm, local_weights(algorithm, micros))
    tally, gradients = Tally(algorithm), []
    for micro in micros:
        given = micro.each[of].clone().requires_grad_()
        losses = tally.add(_out(algorithm, given, micro), micro)
        scaled(losses, algorithm.terms, weights, 1).backward()
        assert given.grad is not None
        gradients.append(given.grad)
    metrics, _ = tally.reduce(Control(None, 1), weights)
    return metrics, torch.cat(gradients)


def _out(algorithm: Any, given: Tensor, micro: MicroBatch) -> Any:
    nothing = torch.zeros_like(micro.weights)
    return (given, nothing, nothing) if algorithm.needs == "logp" else given


@pytest.mark.parametrize("name", SAME, ids=named)
def test_advantages_and_returns(name: str) -> None:
    case = CASES[name]
    _, estimated = _estimated(case)
    np.testing.assert_allclose(estimated.each["advantage"], _flat(case, "advantages"), **EXACT)
    np.testing.assert_allclose(estimated.each["return"], _flat(case, "returns"), **EXACT)
    _, plain = _estimated(case, whiten_advantages=False)
    np.testing.assert_allclose(plain.each["advantage"], _flat(case, "raw_advantages"), **EXACT)


@pytest.mark.parametrize("name", SAME, ids=named)
def test_policy_loss_and_gradient(name: str) -> None:
    case = CASES[name]
    table, _ = _estimated(case)
    metrics, gradient = _step(PPO(_settings(case)), table, NEW_LOGP)
    assert metrics["loss"] == pytest.approx(case["pg_loss"], rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(gradient.numpy(), _flat(case, "logprobs_gradient"), **EXACT)
    assert metrics["policy/clipfrac_avg"] == pytest.approx(case["metrics"]["policy/clipfrac_avg"], abs=1e-6)
    assert metrics["policy/clipfrac_avg"] > 0.1


@pytest.mark.parametrize("name", FULL, ids=named)
def test_value_loss_and_gradient(name: str) -> None:
    case = CASES[name]
    table, _ = _estimated(case)
    metrics, gradient = _step(Critic(_settings(case)), table, NEW_VALUE)
    coefficient = case["settings"]["vf_coef"]
    assert metrics["loss"] == pytest.approx(coefficient * case["vf_loss"], rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(gradient.numpy(), _flat(case, "values_gradient"), **EXACT)
    assert metrics["val/clipfrac_avg"] == pytest.approx(case["vf_clipfrac"], abs=1e-6)
    assert metrics["val/clipfrac_avg"] > 0.1


@pytest.mark.parametrize("name", CASES, ids=named)
def test_kl_and_objective(name: str) -> None:
    case = CASES[name]
    found, estimated = _estimated(case)
    np.testing.assert_allclose(PPO(_settings(case))._divergence(found), _flat(case, "kl"), **EXACT)
    for metric in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores"):
        expected = case["metrics"][f"objective/{metric}"]
        assert estimated.metrics[f"objective/{metric}"] == pytest.approx(expected, rel=1e-5, abs=1e-6), metric


@pytest.mark.parametrize("name", FULL, ids=named)
def test_ratio_and_divergence_of_the_update(name: str) -> None:
    case = CASES[name]
    table, _ = _estimated(case)
    metrics, _ = _step(PPO(_settings(case)), table, NEW_LOGP)
    for metric in ("policy/approxkl_avg", "val/ratio"):
        assert metrics[metric] == pytest.approx(case["metrics"][metric], rel=1e-5), metric


# What is meant to differ.


def test_the_score_is_on_the_last_token() -> None:
    """TRL puts it after the token that ends the response, on a pad, where it also asks for a value."""
    case = CASES["mixed"]
    _, estimated = _estimated(case, whiten_advantages=False)
    wanted = _flat(case, "raw_advantages")
    assert np.abs(estimated.each["advantage"] - wanted).max() > 0.01
    room = np.array([min(length + 1, len(row)) for length, row in zip(case["lengths"], case["values"], strict=True)])
    longer = {**case, "lengths": room.tolist()}
    rewards, values = (_flat(longer, name).astype(np.float64) for name in ("rewards", "values"))
    theirs, _ = gae(rewards, values, room, case["settings"]["gamma"], case["settings"]["lam"])
    parts = zip(np.split(theirs, np.cumsum(room)[:-1]), case["lengths"], strict=True)
    np.testing.assert_allclose(np.concatenate([part[:length] for part, length in parts]), wanted, **EXACT)


def test_the_value_after_the_end_is_not_trained() -> None:
    """TRL's value loss has one state more of every response that is not full."""
    case = CASES["mixed, no decay"]
    table, _ = _estimated(case)
    metrics, _ = _step(Critic(_settings(case)), table, NEW_VALUE)
    theirs = case["settings"]["vf_coef"] * case["vf_loss"]
    assert abs(metrics["loss"] - theirs) > 1e-3
    room = [min(length + 1, len(row)) for length, row in zip(case["lengths"], case["values"], strict=True)]
    longer = {**case, "lengths": room}
    given = [torch.from_numpy(_flat(longer, name)) for name in (NEW_VALUE, "values", "returns")]
    found = case["settings"]["vf_coef"] * value_loss(*given, case["settings"]["cliprange_value"]).mean()
    assert float(found) == pytest.approx(theirs, rel=1e-6)


def test_the_policy_is_averaged_by_sequence_unless_asked() -> None:
    case = CASES["mixed, no decay"]
    table, _ = _estimated(case)
    metrics, _ = _step(PPO(_settings(case, loss_aggregation="Sequence")), table, NEW_LOGP)
    assert abs(metrics["loss"] - case["pg_loss"]) > 1e-2
    assert PPOConfig().loss_aggregation == "Sequence"


def test_advantages_are_whitened_over_all_ranks() -> None:
    """TRL whitens what one rank has: half of the samples would get another mean and variance."""
    case = CASES["full, k1"]
    raw = _flat(case, "raw_advantages").astype(np.float64)
    half = raw.size // 2
    alone = np.concatenate([whitened(part, np.ones(half, dtype=bool)) for part in (raw[:half], raw[half:])])
    _, estimated = _estimated(case)
    assert np.abs(alone - estimated.each["advantage"]).max() > 0.05


def test_pads_are_in_no_metric() -> None:
    """TRL's approxkl, ratio and entropy of the update are means over the pads too, where they are 0, 1 and whatever."""
    case = CASES["mixed, no decay"]
    table, _ = _estimated(case)
    metrics, _ = _step(PPO(_settings(case)), table, NEW_LOGP)
    share = sum(case["lengths"]) / (len(case["lengths"]) * len(case["values"][0]))
    theirs = case["metrics"]["policy/approxkl_avg"]
    assert metrics["policy/approxkl_avg"] * share == pytest.approx(theirs, rel=1e-5)
    assert metrics["policy/approxkl_avg"] > 1.2 * theirs
