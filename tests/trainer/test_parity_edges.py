"""What goes wrong at the edges of real data, on both sides: pad = EOS, answers that are cut, an adapter whose base is
the reference. TRL's side runs live."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import parity_kit as kit
import parity_trl as trl
import peft
import pytest
import torch
from parity_kit import EOS, named, one_thread, ours  # noqa: F401

from posttrain_api.trainer import PreferenceConfig
from posttrain_trainer.algorithms.language_modeling import LanguageModeling
from posttrain_trainer.algorithms.preference import Preference
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.scorer import Scorer
from posttrain_trainer.tokenset import Example, TrainingRow

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own
PAIRS = kit.pairs(8)
SETTINGS = PreferenceConfig(beta=0.3, sft_weight=0.4)
LOSSES = ["sigmoid", "sft"]
DPO = Preference("DPO", SETTINGS)


def _with_reference(rows: list[TrainingRow]) -> list[MicroBatch]:
    return [kit.with_reference(part, kit.language_model(1)) for part in kit.micros(rows)]


@pytest.mark.parametrize("stage", ["SFT", "Preference"], ids=named)
def test_pad_may_be_eos(stage: str, tmp_path: Path) -> None:
    """EOS is learned all the same: masks come from lengths, not from token ids."""
    scorer = Scorer(kit.language_model(0))
    if stage == "SFT":
        trainer = trl.sft(kit.language_model(0), PAIRS, tmp_path, pad="</s>")
        expected = trl.language(trainer)
        rows = [TrainingRow((kit.example(each.prompt, each.chosen),), {}) for each in PAIRS]
        found = ours(LanguageModeling(), scorer, kit.micros(rows))
    else:
        trainer = trl.dpo(kit.language_model(0), kit.language_model(1), PAIRS, tmp_path, pad="</s>")
        expected = trl.preference(trainer, LOSSES, SETTINGS, trl.batch(trainer))
        found = ours(DPO, scorer, _with_reference(kit.pair_rows(PAIRS)))
    assert int((trl.batch(trainer)["input_ids"] == EOS).sum()) > 3 * len(PAIRS)  # it pads with EOS indeed
    kit.assert_same(found, expected)


@pytest.mark.parametrize("length", [4, 10], ids=named)
def test_answers_that_are_cut(length: int, tmp_path: Path) -> None:
    """Some sequences end without EOS, some have no answer token left."""
    trainer = trl.dpo(kit.language_model(0), kit.language_model(1), PAIRS, tmp_path)
    trainer.data_collator.max_length = length
    expected = trl.preference(trainer, LOSSES, SETTINGS, trl.batch(trainer))
    rows = [replace(row, examples=tuple(_cut(e, length) for e in row.examples)) for row in kit.pair_rows(PAIRS)]
    assert any(example.tokens[-1] != EOS for row in rows for example in row.examples)
    assert any(not example.mask.any() for row in rows for example in row.examples) == (length == 4)
    kit.assert_same(ours(DPO, Scorer(kit.language_model(0)), _with_reference(rows)), expected)


def _cut(example: Example, length: int) -> Example:
    return Example(example.tokens[:length], example.mask[:length])


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's own adapter; its reference is the base, with the adapter off. Its weights are not zero any more."""
    shape = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return trl.dpo(kit.language_model(1), None, PAIRS, tmp_path_factory.mktemp("lora"), peft_config=shape)


def test_an_adapter_and_its_base(adapted: Any) -> None:
    model = peft.get_peft_model(kit.language_model(1), copy.deepcopy(adapted.model.peft_config["default"]))
    model.load_state_dict(adapted.model.state_dict())
    expected = trl.preference(adapted, LOSSES, SETTINGS, trl.batch(adapted))
    found = ours(DPO, Scorer(model), _with_reference(kit.pair_rows(PAIRS)))
    assert all("lora_" in name for name in found.gradients)
    kit.assert_same(found, expected)


def test_an_answer_without_tokens_has_log_probability_zero() -> None:
    """As the cut ones above: nothing is divided by zero, in any loss."""
    rows = [TrainingRow((kit.example((5, 6), ()), kit.example((5, 6), (7, EOS))), {})] * 4
    scorer = Scorer(kit.language_model(0))
    for name in ("DPO", "IPO", "SimPO"):
        found = ours(Preference(name, SETTINGS), scorer, _with_reference(rows))
        assert torch.isfinite(torch.tensor(found.loss))
        assert found.metrics["logps/chosen"] == 0.0
