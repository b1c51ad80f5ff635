"""RewardModel against TRL's RewardTrainer, run live on the same classifier and the same text."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import parity_kit as kit
import parity_trl as trl
import pytest
import torch
from parity_kit import TRL, one_thread, ours  # noqa: F401

from posttrain_api.trainer import RewardModelConfig
from posttrain_trainer.algorithms.reward_model import RewardModel
from posttrain_trainer.microbatch import collate
from posttrain_trainer.score_model import ScoreModel

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own
PAIRS = kit.pairs(8)


@pytest.fixture(scope="module", params=[False, True], ids=[f"plain, {TRL}", f"margin, {TRL}"])
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trl.reward(kit.classifier(0), PAIRS, tmp_path_factory.mktemp("reward"), margin=request.param)


def _theirs(trainer: Any) -> kit.Side:
    inputs = trl.batch(trainer)
    return trl.side(trainer, lambda: trainer.compute_loss(trainer.model, dict(inputs)))


def _rows(trainer: Any) -> Any:
    rows = kit.pair_rows(PAIRS)
    return rows if "margin" in trainer.train_dataset.column_names else [replace(row, values={}) for row in rows]


def test_both_sides_have_the_same_tokens(trainer: Any) -> None:
    inputs, micro = trl.batch(trainer), collate(_rows(trainer), whole=True)
    assert torch.equal(inputs["input_ids"], torch.cat([micro.input_ids[0::2], micro.input_ids[1::2]]))
    assert ("margin" in inputs) == ("margin" in micro.values)


@pytest.mark.parametrize("centering", [0.0, 0.01, 1.0])
def test_loss_gradients_and_metrics(centering: float, trainer: Any) -> None:
    trainer.args.center_rewards_coefficient = centering or None
    expected = _theirs(trainer)
    module = ScoreModel(copy.deepcopy(trainer.model))
    found = ours(RewardModel(RewardModelConfig(centering=centering)), module, kit.micros(_rows(trainer), whole=True))
    kit.assert_same(found, expected)
    kit.assert_metrics(found, expected, ("accuracy", "margin", "mean_reward"))
