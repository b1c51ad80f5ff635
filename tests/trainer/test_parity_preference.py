"""The DPO family against TRL's DPOTrainer and CPOTrainer, run live on the same model and the same text.

Where TRL has no such loss by that name: conservative DPO is its `aot` on one pair at a time (sorting one pair does
nothing), and, a second time, the sum written out from the paper.
"""

from __future__ import annotations

import copy
from typing import Any

import parity_kit as kit
import parity_trl as trl
import pytest
import torch
from parity_kit import PAD, named, one_thread, ours  # noqa: F401
from torch.nn.functional import logsigmoid

from posttrain_api.trainer import PreferenceConfig
from posttrain_trainer.algorithms.preference import Preference
from posttrain_trainer.microbatch import collate
from posttrain_trainer.scorer import Scorer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own
PAIRS = kit.pairs(8)
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "entropy",
    "mean_token_accuracy",
)
LOSSES = {
    "DPO": ("sigmoid", PreferenceConfig(beta=0.3)),
    "IPO": ("ipo", PreferenceConfig(beta=0.3)),
    "Hinge": ("hinge", PreferenceConfig(beta=0.1)),
    "RobustDPO": ("robust", PreferenceConfig(beta=0.3, label_smoothing=0.2)),
    "APOZero": ("apo_zero", PreferenceConfig(beta=0.3)),
    "APODown": ("apo_down", PreferenceConfig(beta=0.3)),
}


@pytest.fixture(scope="module")
def policy() -> Any:
    return kit.language_model(0)


@pytest.fixture(scope="module")
def reference() -> Any:
    return kit.language_model(1)


@pytest.fixture(scope="module")
def scorer(policy: Any) -> Scorer:
    return Scorer(copy.deepcopy(policy))


@pytest.fixture(scope="module")
def dpo(policy: Any, reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trl.dpo(copy.deepcopy(policy), copy.deepcopy(reference), PAIRS, tmp_path_factory.mktemp("dpo"))


def _ours(name: str, settings: PreferenceConfig, scorer: Scorer, reference: Any) -> kit.Side:
    parts = [kit.with_reference(part, reference) for part in kit.micros(kit.pair_rows(PAIRS))]
    return ours(Preference(name, settings), scorer, parts)


def test_both_sides_have_the_same_tokens(dpo: Any) -> None:
    inputs = trl.batch(dpo)
    micro = collate(kit.pair_rows(PAIRS), whole=True)
    chosen_first = torch.cat([micro.input_ids[0::2], micro.input_ids[1::2]])
    assert PAD == 0  # what ours pads with
    assert torch.equal(inputs["input_ids"], chosen_first)
    assert int(inputs["completion_mask"].sum()) == len(micro.targets)


@pytest.mark.parametrize("name", LOSSES, ids=named)
def test_loss_gradients_and_metrics(name: str, dpo: Any, scorer: Scorer, reference: Any) -> None:
    loss, settings = LOSSES[name]
    expected = trl.preference(dpo, [loss], settings, trl.batch(dpo))
    found = _ours(name, settings, scorer, reference)
    kit.assert_same(found, expected)
    kit.assert_metrics(found, expected, METRICS)


@pytest.mark.parametrize("name", LOSSES, ids=named)
def test_with_a_term_of_sft(name: str, dpo: Any, scorer: Scorer, reference: Any) -> None:
    loss, settings = LOSSES[name]
    settings = settings.model_copy(update={"sft_weight": 0.4})
    expected = trl.preference(dpo, [loss, "sft"], settings, trl.batch(dpo))
    kit.assert_same(_ours(name, settings, scorer, reference), expected)


@pytest.mark.parametrize("smoothing", [0.2, 0.5], ids=named)
def test_conservative_dpo_is_aot_of_one_pair(smoothing: float, dpo: Any, scorer: Scorer, reference: Any) -> None:
    settings = PreferenceConfig(beta=0.3, label_smoothing=smoothing)
    dpo.loss_types, dpo.loss_weights, dpo.beta, dpo.label_smoothing = ["aot"], [1.0], 0.3, smoothing
    alone = [dpo.data_collator([row]) for row in dpo.train_dataset]

    def mean() -> torch.Tensor:
        return torch.stack([dpo._compute_loss(dpo.model, each, return_outputs=False) for each in alone]).mean()

    kit.assert_same(_ours("DPO", settings, scorer, reference), trl.side(dpo, mean))


def test_conservative_dpo_as_its_paper_writes_it(scorer: Scorer, reference: Any) -> None:
    """Mitchell 2023, equation 3, transcribed; in fp64."""
    micro = kit.with_reference(collate(kit.pair_rows(PAIRS)), reference)
    with torch.no_grad():
        logp, _, _ = scorer(*scorer.inputs(micro))
        ratios = (micro.by_sequence(logp).double() - micro.values["reference"].double()).view(-1, 2)
    difference = 0.3 * (ratios[:, 0] - ratios[:, 1])
    expected = (-0.8 * logsigmoid(difference) - 0.2 * logsigmoid(-difference)).mean()
    found = _ours("DPO", PreferenceConfig(beta=0.3, label_smoothing=0.2), scorer, reference)
    assert found.loss == pytest.approx(float(expected), rel=kit.LOSS)


@pytest.fixture(scope="module")
def cpo(policy: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trl.simpo(copy.deepcopy(policy), PAIRS, tmp_path_factory.mktemp("cpo"))


def _simpo(trainer: Any) -> tuple[kit.Side, dict[str, float]]:
    inputs = trainer.data_collator(list(trainer.train_dataset))
    logged: dict[str, float] = {}

    def loss() -> torch.Tensor:
        value, metrics = trainer.get_batch_loss_metrics(trainer.model, inputs)
        logged.update(metrics)
        return value

    return trl.side(trainer, loss), logged


@pytest.mark.parametrize("ratio", [0.0, 0.5], ids=named)
def test_simpo(ratio: float, cpo: Any, scorer: Scorer) -> None:
    settings = PreferenceConfig(beta=2.0, gamma_beta_ratio=ratio)
    cpo.simpo_gamma = 2.0 * ratio
    expected, metrics = _simpo(cpo)
    found = ours(Preference("SimPO", settings), scorer, kit.micros(kit.pair_rows(PAIRS)))
    kit.assert_same(found, expected)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert found.metrics[name] == pytest.approx(metrics[name], rel=1e-5), name
