"""Pretrain and SFT against TRL's SFTTrainer, run live on the same model and the same text."""

from __future__ import annotations

import copy
from typing import Any

import datasets
import numpy as np
import parity_kit as kit
import pytest
import torch
from parity_kit import EOS, named, one_thread, ours, theirs  # noqa: F401

from posttrain_trainer.algorithms.language_modeling import LanguageModeling
from posttrain_trainer.microbatch import collate
from posttrain_trainer.scorer import Scorer
from posttrain_trainer.tokenset import Example, TrainingRow

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own
PAIRS = kit.pairs(8)


def _pretrain() -> tuple[Any, list[TrainingRow]]:
    """Documents: every token but the first is counted."""
    documents = [(*each.prompt, *each.chosen) for each in PAIRS]
    rows = [
        Example(np.array(tokens, dtype=np.int32), np.array([0] + [1] * (len(tokens) - 1), dtype=np.uint8))
        for tokens in documents
    ]
    data = datasets.Dataset.from_list([{"text": kit.text(tokens)} for tokens in documents])
    return data, [TrainingRow((row,), {}) for row in rows]


def _sft() -> tuple[Any, list[TrainingRow]]:
    """Prompts and completions: the completion and its EOS are counted."""
    data = [{"prompt": kit.text(each.prompt), "completion": kit.text(each.chosen)} for each in PAIRS]
    rows = [TrainingRow((kit.example(each.prompt, each.chosen),), {}) for each in PAIRS]
    return datasets.Dataset.from_list(data), rows


STAGES = {"Pretrain": _pretrain, "SFT": _sft}


@pytest.fixture(scope="module", params=STAGES, ids=named)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[TrainingRow]]:
    from trl import SFTConfig, SFTTrainer

    data, rows = STAGES[request.param]()
    trainer = SFTTrainer(
        kit.language_model(0),
        args=SFTConfig(**kit.arguments(tmp_path_factory.mktemp("sft"))),
        train_dataset=data,
        processing_class=kit.tokenizer(),
    )
    return trainer, rows


def _theirs(trainer: Any) -> kit.Side:
    inputs = kit.batch(trainer)
    items = (inputs["labels"][:, 1:] != -100).sum()  # as transformers' Trainer counts them
    return theirs(trainer, lambda: trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=items))


def test_both_sides_have_the_same_tokens(stage: Any) -> None:
    trainer, rows = stage
    inputs, micro = kit.batch(trainer), collate(rows, whole=True)
    assert torch.equal(inputs["input_ids"], micro.input_ids)
    labels = inputs["labels"][:, 1:]
    assert labels[labels != -100].tolist() == micro.targets.tolist()
    assert EOS in micro.targets.tolist()


def test_loss_gradients_and_metrics(stage: Any) -> None:
    trainer, rows = stage
    expected = _theirs(trainer)
    found = ours(LanguageModeling(), Scorer(copy.deepcopy(_plain(trainer.model))), kit.micros(rows))
    kit.assert_same(found, expected)
    kit.assert_metrics(found, expected, ("entropy", "mean_token_accuracy"))


def test_the_loss_is_transformers_own(stage: Any) -> None:
    """The model's own loss, from whole logits: what both sides' heads must not change."""
    trainer, rows = stage
    model, inputs = _plain(trainer.model), kit.batch(trainer)
    expected = model(**inputs, use_cache=False).loss
    found = ours(LanguageModeling(), Scorer(copy.deepcopy(model)), kit.micros(rows))
    assert found.loss == pytest.approx(float(expected.detach()), rel=kit.LOSS)


def _plain(model: Any) -> Any:
    """The same weights without TRL's forward."""
    fresh = kit.language_model(0)
    fresh.load_state_dict(model.state_dict())
    return fresh
