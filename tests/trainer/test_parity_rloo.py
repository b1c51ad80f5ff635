"""RLOO against TRL's RLOOTrainer, run live on one rollout with the same models."""

from __future__ import annotations

from typing import Any

import numpy as np
import parity_kit as kit
import parity_online as online
import pytest
from parity_kit import named, one_thread  # noqa: F401
from parity_online import Models

from posttrain_api.online import RLOOConfig
from posttrain_trainer.algorithms.rloo import RLOO

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own
GIVEN = online.rollout()
METRICS = ("entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
CASES = {
    "plain": RLOOConfig(kl_coefficient=0.0),
    "KL in the reward": RLOOConfig(kl_coefficient=0.05),
    "normalised": RLOOConfig(kl_coefficient=0.05, normalize_advantages=True),
    "wide clip": RLOOConfig(kl_coefficient=0.05, clip_range=0.9),
}


@pytest.fixture(scope="module")
def models() -> Models:
    return online.models(head=0.3)


@pytest.fixture(scope="module")
def trainer(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return online.rloo(models, tmp_path_factory.mktemp("rloo"))


def _theirs(trainer: Any, models: Models, settings: RLOOConfig) -> online.Theirs:
    trainer.beta, trainer.normalize_advantages = settings.kl_coefficient, settings.normalize_advantages
    trainer.epsilon_low = trainer.epsilon_high = settings.clip_range
    return online.theirs(trainer, GIVEN, models)


@pytest.mark.parametrize("name", CASES, ids=named)
def test_loss_gradients_and_metrics(name: str, trainer: Any, models: Models) -> None:
    theirs = _theirs(trainer, models, CASES[name])
    ours = online.ours(RLOO(CASES[name]), online.experience(GIVEN, models), models)
    kit.assert_same(ours, theirs.side)
    kit.assert_metrics(ours, theirs.side, [*METRICS, *(["kl"] if CASES[name].kl_coefficient else [])])


@pytest.mark.parametrize("name", CASES, ids=named)
def test_advantages(name: str, trainer: Any, models: Models) -> None:
    theirs = _theirs(trainer, models, CASES[name]).inputs["advantages"].tolist()
    found = online.experience(GIVEN, models)
    ours = RLOO(CASES[name]).estimate(found, 0.0).each["advantage"]
    np.testing.assert_allclose(ours, online.by_token(theirs, found), rtol=1e-5, atol=1e-5)


def test_first_update(trainer: Any, models: Models) -> None:
    """The old policy is the one that learns: every ratio is 1, with a gradient."""
    same = online.Models(models.old, models.old, models.reference)
    settings = RLOOConfig(kl_coefficient=0.0)
    trainer.beta, trainer.normalize_advantages = 0.0, False
    theirs = online.theirs(trainer, GIVEN, same)
    ours = online.ours(RLOO(settings), online.without_old(online.experience(GIVEN, same)), same)
    kit.assert_same(ours, theirs.side)
