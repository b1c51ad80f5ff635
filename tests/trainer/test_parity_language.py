"""Pretrain and SFT against TRL's SFTTrainer, run live on the same model and the same text."""

from __future__ import annotations

import copy
from typing import Any

import parity_kit as kit
import parity_trl as trl
import pytest
import torch
from parity_kit import EOS, named, one_thread, ours  # noqa: F401

from posttrain_trainer.algorithms.language_modeling import LanguageModeling
from posttrain_trainer.microbatch import collate
from posttrain_trainer.scorer import Scorer
from posttrain_trainer.tokenset import TrainingRow

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own
PAIRS = kit.pairs(8)


def _documents() -> list[TrainingRow]:
    """Every token but the first is counted."""
    return [
        TrainingRow((kit.example(tokens[:1], tokens[1:]),), {}) for tokens in ((*p.prompt, *p.chosen) for p in PAIRS)
    ]


def _answers() -> list[TrainingRow]:
    return [TrainingRow((kit.example(each.prompt, each.chosen),), {}) for each in PAIRS]


STAGES = {"Pretrain": (trl.pretrain, _documents), "SFT": (trl.sft, _answers)}


@pytest.fixture(scope="module", params=STAGES, ids=named)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[TrainingRow]]:
    make, rows = STAGES[request.param]
    return make(kit.language_model(0), PAIRS, tmp_path_factory.mktemp("sft")), rows()


def test_both_sides_have_the_same_tokens(stage: Any) -> None:
    trainer, rows = stage
    inputs, micro = trl.batch(trainer), collate(rows, whole=True)
    assert torch.equal(inputs["input_ids"], micro.input_ids)
    labels = inputs["labels"][:, 1:]
    assert labels[labels != -100].tolist() == micro.targets.tolist()
    assert EOS in micro.targets.tolist()


def test_loss_gradients_and_metrics(stage: Any) -> None:
    trainer, rows = stage
    expected = trl.language(trainer)
    found = ours(LanguageModeling(), Scorer(copy.deepcopy(_plain(trainer.model))), kit.micros(rows))
    kit.assert_same(found, expected)
    kit.assert_metrics(found, expected, ("entropy", "mean_token_accuracy"))


def test_the_loss_is_transformers_own(stage: Any) -> None:
    """The model's own loss, from whole logits: what both sides' heads must not change."""
    trainer, rows = stage
    model, inputs = _plain(trainer.model), trl.batch(trainer)
    expected = model(**inputs, use_cache=False).loss
    found = ours(LanguageModeling(), Scorer(copy.deepcopy(model)), kit.micros(rows))
    assert found.loss == pytest.approx(float(expected.detach()), rel=kit.LOSS)


def _plain(model: Any) -> Any:
    """The same weights without TRL's forward."""
    fresh = kit.language_model(0)
    fresh.load_state_dict(model.state_dict())
    return fresh
