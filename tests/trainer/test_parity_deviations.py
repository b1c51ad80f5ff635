"""Where this trainer is meant to differ from TRL, and how: docs/decisions/0008. TRL's side runs live.

A test here that fails after TRL is renewed may be good news: strike the line from the list.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import parity_kit as kit
import parity_trl as trl
import pytest
import torch
from parity_kit import EOS, one_thread, ours  # noqa: F401

from posttrain_api.trainer import PreferenceConfig, RewardModelConfig
from posttrain_trainer.algorithms.language_modeling import LanguageModeling
from posttrain_trainer.algorithms.preference import Preference
from posttrain_trainer.algorithms.reward_model import RewardModel
from posttrain_trainer.data.fit import IDENTICAL, TOO_LONG, Limits, answered, fit_pair
from posttrain_trainer.data.messages import RowRefused
from posttrain_trainer.data.rows import parse_row
from posttrain_trainer.data.schema import Kind
from posttrain_trainer.microbatch import collate
from posttrain_trainer.schedule import Schedule
from posttrain_trainer.score_model import ScoreModel
from posttrain_trainer.scorer import Scorer
from posttrain_trainer.tokenset import TrainingRow

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own
PAIRS = kit.pairs(8)
CUTS = ((0, 1), (1, 8))
"""Micro-batches of unequal size, as they come where batches are cut by tokens or the last one is smaller."""


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trl.dpo(kit.language_model(0), kit.language_model(1), PAIRS, tmp_path_factory.mktemp("dpo"))


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trl.reward(kit.classifier(0), PAIRS, tmp_path_factory.mktemp("reward"), margin=True)


def _mean(sides: Sequence[kit.Side]) -> float:
    return sum(side.loss for side in sides) / len(sides)


def _policy(settings: PreferenceConfig, name: str = "DPO") -> kit.Side:
    parts = [kit.with_reference(part, kit.language_model(1)) for part in kit.micros(kit.pair_rows(PAIRS))]
    return ours(Preference(name, settings), Scorer(kit.language_model(0)), parts)


@pytest.mark.parametrize("sft_weight", [0.0, 0.4])
def test_preference_is_divided_once_per_step(dpo: Any, sft_weight: float) -> None:
    """TRL's step is the mean of its micro-batches' means, so a pair in a small one counts for more."""
    settings = PreferenceConfig(beta=0.3, sft_weight=sft_weight)
    names = ["sigmoid", "sft"] if sft_weight else ["sigmoid"]
    whole = trl.preference(dpo, names, settings, trl.batch(dpo))
    cut = [trl.preference(dpo, names, settings, trl.batch(dpo, *each)) for each in CUTS]
    found = _policy(settings)
    assert found.loss == pytest.approx(whole.loss, rel=kit.LOSS)
    assert abs(_mean(cut) - whole.loss) > 1e-3


def test_reward_is_divided_once_per_step(reward: Any) -> None:
    def loss(begin: int, end: int) -> kit.Side:
        inputs = trl.batch(reward, begin, end)
        return trl.side(reward, lambda: reward.compute_loss(reward.model, inputs))

    parts = kit.micros(kit.pair_rows(PAIRS), whole=True)
    found = ours(RewardModel(RewardModelConfig()), ScoreModel(kit.classifier(0)), parts)
    assert found.loss == pytest.approx(loss(0, 8).loss, rel=kit.LOSS)
    assert abs(_mean([loss(*each) for each in CUTS]) - found.loss) > 1e-3


def test_metrics_are_divided_once_per_step(dpo: Any) -> None:
    """TRL logs the mean of its micro-batches' entropies, whatever number of tokens they have."""
    settings = PreferenceConfig(beta=0.3)
    whole = trl.preference(dpo, ["sigmoid"], settings, trl.batch(dpo)).metrics["entropy"]
    cut = [trl.preference(dpo, ["sigmoid"], settings, trl.batch(dpo, *each)).metrics["entropy"] for each in CUTS]
    assert _policy(settings).metrics["entropy"] == pytest.approx(whole, rel=1e-5)
    assert abs(sum(cut) / 2 - whole) > 1e-3


def test_evaluation_is_divided_by_tokens(tmp_path: Path) -> None:
    """transformers' evaluation is the mean of its batches' means, weighted by rows."""
    trainer = trl.sft(kit.language_model(0), PAIRS, tmp_path, per_device_eval_batch_size=3)
    rows = [TrainingRow((kit.example(each.prompt, each.chosen),), {}) for each in PAIRS]
    found = ours(LanguageModeling(), Scorer(kit.language_model(0)), kit.micros(rows))
    in_batches = trainer.evaluate()["eval_loss"]
    trainer.args.per_device_eval_batch_size = len(PAIRS)
    assert found.loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert abs(in_batches - found.loss) > 1e-3


def test_dpo_has_label_smoothing(dpo: Any) -> None:
    """TRL's `sigmoid` ignores it without a word."""
    plain, smoothed = PreferenceConfig(beta=0.3), PreferenceConfig(beta=0.3, label_smoothing=0.2)
    inputs = trl.batch(dpo)
    theirs = [trl.preference(dpo, ["sigmoid"], each, inputs).loss for each in (plain, smoothed)]
    assert theirs[0] == theirs[1]
    assert abs(_policy(plain).loss - _policy(smoothed).loss) > 1e-3


def test_a_score_is_read_by_length(tmp_path: Path) -> None:
    """transformers, and so TRL, looks for the last token that is not the pad token: with pad = EOS one too early."""
    model = kit.classifier(0)
    trainer = trl.reward(model, PAIRS, tmp_path, margin=False)
    ends = ScoreModel(copy.deepcopy(model))
    micro = collate(kit.pair_rows(PAIRS), whole=True)
    earlier = [
        TrainingRow(tuple(kit.example(e.tokens[:1], e.tokens[1:-1]) for e in row.examples), {})
        for row in kit.pair_rows(PAIRS)
        if min(len(e.tokens) for e in row.examples) > 2
    ]
    kept = [pair for pair in PAIRS if min(len(pair.chosen), len(pair.rejected)) + len(pair.prompt) > 2]
    trainer.model.config.pad_token_id = EOS
    with torch.no_grad():
        theirs = trainer.model(**_padded(kept)).logits[:, 0]
        before_eos = collate(earlier, whole=True)
        torch.testing.assert_close(theirs, ends(*ends.inputs(before_eos)), rtol=1e-5, atol=1e-6)
        at_eos = ends(*ends.inputs(collate(kit.pair_rows(kept), whole=True)))
    assert float((at_eos - theirs).abs().max()) > 1e-3
    assert micro.input_ids.flatten()[micro.ends].tolist() == [EOS] * 2 * len(PAIRS)


def _padded(pairs: Sequence[kit.Pair]) -> dict[str, torch.Tensor]:
    """Chosen and rejected in turn, padded with EOS."""
    micro = collate(kit.pair_rows(pairs), whole=True)
    lengths = micro.ends % micro.input_ids.shape[1] + 1
    real = torch.arange(micro.input_ids.shape[1]) < lengths[:, None]
    return {"input_ids": micro.input_ids.masked_fill(~real, EOS), "attention_mask": real.long()}


def test_simpos_log_probabilities_are_sums(tmp_path: Path) -> None:
    """As in every other loss; TRL's CPOTrainer logs means per token under the same name."""
    trainer = trl.simpo(kit.language_model(0), PAIRS, tmp_path)
    _, logged = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    found = ours(
        Preference("SimPO", PreferenceConfig(beta=2.0)),
        Scorer(kit.language_model(0)),
        kit.micros(kit.pair_rows(PAIRS)),
    )
    assert found.metrics["logps/chosen"] < 2 * logged["logps/chosen"] < 0
    assert found.metrics["logps/chosen"] == pytest.approx(_policy(PreferenceConfig()).metrics["logps/chosen"])


def test_metrics_that_are_left_out(dpo: Any, reward: Any) -> None:
    """They are no sums, or need whole logits. `num_tokens` is reported as tokens per second."""
    theirs = trl.preference(dpo, ["sigmoid"], PreferenceConfig(), trl.batch(dpo)).metrics
    assert theirs.keys() - _policy(PreferenceConfig()).metrics == {"logits/chosen", "logits/rejected", "num_tokens"}
    inputs = trl.batch(reward)
    logged = trl.side(reward, lambda: reward.compute_loss(reward.model, inputs)).metrics
    parts = kit.micros(kit.pair_rows(PAIRS), whole=True)
    found = ours(RewardModel(RewardModelConfig()), ScoreModel(kit.classifier(0)), parts)
    assert logged.keys() - found.metrics == {"min_reward", "max_reward", "num_tokens"}


def test_pairs_that_teach_nothing_are_left_out(dpo: Any) -> None:
    """TRL takes the pair of equal answers, and the one whose chosen answer is EOS alone."""
    assert PAIRS[0].chosen == (EOS,)
    assert PAIRS[1].chosen == PAIRS[1].rejected
    assert len(dpo.train_dataset) == len(PAIRS)
    same = answered(list(PAIRS[1].prompt), list(PAIRS[1].chosen))
    with pytest.raises(RowRefused) as equal:
        fit_pair(same, same, Limits(64, "Skip"), None)
    with pytest.raises(RowRefused) as empty:
        parse_row({"prompt": "q", "chosen": "", "rejected": "b"}, Kind.COMPARISON, {}, "Auto")
    assert (equal.value.reason, empty.value.reason) == (IDENTICAL, "EmptyCompletion")


def test_a_pair_too_long_is_left_out(tmp_path: Path) -> None:
    trainer = trl.dpo(kit.language_model(0), kit.language_model(1), PAIRS, tmp_path, max_length=10)
    pair = max(PAIRS, key=lambda each: len(each.prompt) + len(each.chosen))
    assert len(pair.prompt) + len(pair.chosen) > 10
    assert trl.batch(trainer)["input_ids"].shape == (2 * len(PAIRS), 10)
    both = [answered(list(pair.prompt), list(answer)) for answer in (pair.chosen, pair.rejected)]
    with pytest.raises(RowRefused) as refused:
        fit_pair(*both, Limits(10, "Skip"), None)
    assert refused.value.reason == TOO_LONG


def test_the_first_step_learns() -> None:
    """transformers' warm-up begins with a rate of 0."""
    from transformers import get_linear_schedule_with_warmup

    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = get_linear_schedule_with_warmup(torch.optim.SGD([parameter], lr=1.0), 3, 10)
    rate = Schedule("Linear", 1.0, warmup_steps=3, total_steps=10, min_ratio=0.0).rate
    assert theirs.get_last_lr() == [0.0]
    assert [rate(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
