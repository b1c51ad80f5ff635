"""Preference and RewardModel as the loop sees them: terms, weights, what is reported, dummies, the start."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity_kit import one_thread  # noqa: F401
from torch import Tensor
from trainer_kit import Shape, make_config

from posttrain_api.trainer import PreferenceConfig, RewardModelConfig
from posttrain_trainer.algorithms import algorithm_of
from posttrain_trainer.algorithms.preference import VARIANTS, Preference
from posttrain_trainer.algorithms.reward_model import RewardModel
from posttrain_trainer.losses import Scores
from posttrain_trainer.microbatch import MicroBatch, collate, dummy
from posttrain_trainer.tokenset import Example, TrainingRow

PROMPT = [5, 6, 7]
ALL = sorted(VARIANTS)


def _row(chosen: list[int], rejected: list[int], **values: float) -> TrainingRow:
    examples = []
    for answer in (chosen, rejected):
        mask = [0] * len(PROMPT) + [1] * len(answer)
        examples.append(Example(np.array(PROMPT + answer, dtype=np.int32), np.array(mask, dtype=np.uint8)))
    return TrainingRow(tuple(examples), values)


def _with_reference(micro: MicroBatch, reference: list[float]) -> MicroBatch:
    return replace(micro, values={**micro.values, "reference": torch.tensor(reference)})


def _scores(logp: list[float], correct: list[float] | None = None) -> Scores:
    given = torch.tensor(logp, requires_grad=True)
    return given, torch.full((len(logp),), 0.5), torch.tensor(correct or [1.0] * len(logp))


def _of(losses: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in losses.items()}


def _means(measures: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    return {name: float(value / weight) for name, (value, weight) in measures.items()}


# Two pairs: answers of 2 and 1 tokens, then of 1 and 3.
# Σ log p: −3, −1 and −2, −6. Reference: −4, −2.5 and −2, −5. a: 1, 1.5 and 0, −1.
MICRO = collate([_row([8, 9], [10]), _row([11], [12, 13, 14])])
LOGP = [-1.0, -2.0, -1.0, -2.0, -1.0, -2.0, -3.0]
REFERENCE = [-4.0, -2.5, -2.0, -5.0]


def test_a_micro_batch_by_hand() -> None:
    algorithm = Preference("DPO", PreferenceConfig(beta=2.0, sft_weight=0.5))
    micro = _with_reference(MICRO, REFERENCE)
    out = _scores(LOGP, [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert algorithm.terms == {"preference": 1.0, "sft": 0.5}
    assert algorithm.weights(micro) == {"preference": 2.0, "sft": 3.0}
    # βΔ = 2·(1 − 1.5) = −1 and 2·(0 + 1) = 2: log(1 + e) + log(1 + e⁻²) = 1.31326169 + 0.12692801
    # chosen tokens: 1 + 2 + 2 = 5
    assert _of(algorithm.losses(out, micro)) == pytest.approx({"preference": 1.44018970, "sft": 5.0}, rel=1e-6)
    expected = {
        "rewards/chosen": 1.0,  # 2·(1 + 0)/2
        "rewards/rejected": 0.5,  # 2·(1.5 − 1)/2
        "rewards/margins": 0.5,
        "rewards/accuracies": 0.5,
        "logps/chosen": -2.5,
        "logps/rejected": -3.5,
        "entropy": 0.5,
        "mean_token_accuracy": 2 / 3,  # chosen answers only
    }
    assert _means(algorithm.measures(out, micro)) == pytest.approx(expected)


def test_means_per_token_by_hand() -> None:
    out = _scores(LOGP)
    # IPO: a per token 0.5, 1.5 and 0, −1/3; β = 1: (0.5 − 1.5 − 0.5)² + (1/3 − 0.5)² = 2.25 + 1/36
    ipo = Preference("IPO", PreferenceConfig(beta=1.0))
    micro = _with_reference(MICRO, REFERENCE)
    assert _of(ipo.losses(out, micro)) == pytest.approx({"preference": 2.25 + 1 / 36}, rel=1e-6)
    rewards = _means(ipo.measures(out, micro))  # of sums, as TRL reports them
    assert (rewards["rewards/chosen"], rewards["rewards/rejected"]) == pytest.approx((0.5, 0.25))
    # SimPO: log p per token −1.5, −1 and −2, −2; β = 2, γ = 1: −log σ(−2) − log σ(−1) = 2.12692801 + 1.31326169
    simpo = Preference("SimPO", PreferenceConfig(beta=2.0, gamma_beta_ratio=0.5))
    assert _of(simpo.losses(out, MICRO)) == pytest.approx({"preference": 3.44018970}, rel=1e-6)
    rewards = _means(simpo.measures(out, MICRO))
    assert (rewards["rewards/chosen"], rewards["rewards/rejected"]) == pytest.approx((-3.5, -3.0))
    assert rewards["rewards/accuracies"] == 0.0  # equal is not better


@pytest.mark.parametrize("name", ALL)
def test_each_name_has_its_own_loss(name: str) -> None:
    settings = PreferenceConfig(beta=0.7, label_smoothing=0.1)
    micro = _with_reference(MICRO, REFERENCE)
    values = {each: _of(Preference(each, settings).losses(_scores(LOGP), micro))["preference"] for each in ALL}
    others = [value for each, value in values.items() if each != name]
    assert all(abs(values[name] - other) > 1e-3 for other in others)


START = {
    "DPO": math.log(2),
    "RobustDPO": math.log(2),
    "Hinge": 1.0,
    "APOZero": 1.0,
    "APODown": 1.0,
    "IPO": 1 / (4 * 0.2**2),
    "SimPO": None,
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_start_is_known(name: str, smoothing: float) -> None:
    algorithm = Preference(name, PreferenceConfig(beta=0.2, label_smoothing=smoothing, sft_weight=0.5))
    expected = START[name]
    assert algorithm.needs_reference == (expected is not None)
    if expected is None:
        assert algorithm.start_loss() is None
        return
    assert algorithm.start_loss() == pytest.approx(expected, rel=1e-6)
    at_start = algorithm.losses(_scores(LOGP), _with_reference(MICRO, [-3.0, -1.0, -2.0, -6.0]))
    assert float(at_start["preference"]) / 2 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_a_dummy_counts_nothing_and_keeps_the_graph(name: str) -> None:
    algorithm = Preference(name, PreferenceConfig(label_smoothing=0.1, sft_weight=1.0))
    micro = _with_reference(dummy(_row([8, 9], [10])), [-1e4, 3.0])
    out = _scores([-1.0, -2.0])
    losses = algorithm.losses(out, micro)
    assert algorithm.weights(micro) == {"preference": 0.0, "sft": 0.0}
    assert _of(losses) == {"preference": 0.0, "sft": 0.0}
    (gradient,) = torch.autograd.grad(sum(losses.values()), out[0])
    assert gradient.tolist() == [0.0, 0.0]
    for value, weight in algorithm.measures(out, micro).values():
        assert (float(value), float(weight)) == (0.0, 0.0)


@pytest.fixture(scope="module")
def scorer() -> Any:
    import transformers

    from posttrain_trainer.scorer import Scorer

    torch.manual_seed(0)
    return Scorer(transformers.AutoModelForCausalLM.from_config(Shape().config(), dtype=torch.float32))


def _gradient(algorithm: Any, scorer: Any, micro: MicroBatch) -> tuple[dict[str, float], Tensor]:
    scorer.zero_grad()
    losses = algorithm.losses(scorer(*scorer.inputs(micro)), micro)
    sum(losses.values()).backward()
    gradient = torch.cat([each.grad.flatten() for each in scorer.parameters()])
    return _of(losses), gradient


def test_equal_answers_teach_nothing(scorer: Any) -> None:
    micro = _with_reference(collate([_row([8, 9], [8, 9])]), [-3.0, -3.0])
    found, gradient = _gradient(Preference("DPO", PreferenceConfig()), scorer, micro)
    assert found["preference"] == pytest.approx(math.log(2), rel=1e-6)
    # what remains is the rounding of equal and opposite sums of gradients of about 1
    assert float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("name", ALL)
def test_pairs_may_be_cut_anywhere(name: str, scorer: Any) -> None:
    algorithm = Preference(name, PreferenceConfig(beta=0.5, label_smoothing=0.1, sft_weight=0.3))
    together, whole = _gradient(algorithm, scorer, _with_reference(MICRO, REFERENCE))
    parts = [
        _with_reference(collate([_row([8, 9], [10])]), REFERENCE[:2]),
        _with_reference(collate([_row([11], [12, 13, 14])]), REFERENCE[2:]),
        _with_reference(dummy(_row([8, 9], [10])), [0.0, 0.0]),
    ]
    found = [_gradient(algorithm, scorer, part) for part in parts]
    for term, value in together.items():
        assert sum(losses[term] for losses, _ in found) == pytest.approx(value, rel=1e-6)
    difference = sum(gradient for _, gradient in found) - whole
    assert float(difference.norm() / whole.norm()) < 1e-6


def test_reward_by_hand() -> None:
    algorithm = RewardModel(RewardModelConfig(centering=0.1))
    micro = collate([_row([8, 9], [10], margin=1.0), _row([11], [12, 13, 14], margin=0.0)], whole=True)
    out = torch.tensor([2.0, 2.0, 1.0, -1.0], requires_grad=True)
    assert algorithm.terms == {"ranking": 1.0, "centering": 0.1}
    assert algorithm.weights(micro) == {"ranking": 2.0, "centering": 2.0}
    # −log σ(2 − 2 − 1) − log σ(1 + 1) = 1.31326169 + 0.12692801; (2 + 2)² + 0 = 16
    found = _of(algorithm.losses(out, micro))
    assert found == pytest.approx({"ranking": 1.44018970, "centering": 16.0}, rel=1e-6)
    expected = {"accuracy": 0.5, "margin": 1.0, "mean_reward": 1.0}
    assert _means(algorithm.measures(out, micro)) == pytest.approx(expected)


def test_reward_without_margin_and_centering() -> None:
    algorithm = RewardModel(RewardModelConfig())
    micro = collate([_row([8, 9], [10])], whole=True)
    found = _of(algorithm.losses(torch.tensor([3.0, 3.0]), micro))
    assert found == pytest.approx({"ranking": math.log(2)}, rel=1e-6)


def test_a_dummy_reward_counts_nothing() -> None:
    algorithm = RewardModel(RewardModelConfig(centering=0.1))
    micro = dummy(_row([8, 9], [10], margin=5.0), whole=True)
    out = torch.tensor([1e4, -3.0], requires_grad=True)
    losses = algorithm.losses(out, micro)
    (gradient,) = torch.autograd.grad(sum(losses.values()), out)
    assert algorithm.weights(micro) == {"ranking": 0.0, "centering": 0.0}
    assert _of(losses) == {"ranking": 0.0, "centering": 0.0}
    assert gradient.tolist() == [0.0, 0.0]
    assert {float(weight) for _, weight in algorithm.measures(out, micro).values()} == {0.0}


def test_the_stage_chooses(tmp_path: Path) -> None:
    preference = algorithm_of(make_config(tmp_path, stage="Preference", algorithm="Hinge"))
    reward = algorithm_of(make_config(tmp_path, stage="RewardModel", reward_model__centering=0.2))
    assert isinstance(preference, Preference)
    assert preference.start_loss() == 1.0
    assert (reward.needs, dict(reward.terms)) == ("score", {"ranking": 1.0, "centering": 0.2})
    assert {algorithm_of(make_config(tmp_path, stage=stage)).needs for stage in ("Pretrain", "SFT")} == {"logp"}
