"""GRPO and its family against TRL's GRPOTrainer, run live on one rollout with the same models."""

from __future__ import annotations

from typing import Any

import numpy as np
import parity_kit as kit
import parity_online as online
import pytest
from parity_kit import named, one_thread  # noqa: F401
from parity_online import MOST, Models

from posttrain_api.online import GRPOConfig, OverlongPenalty
from posttrain_trainer.advantages import overlong
from posttrain_trainer.algorithms.grpo import GRPO
from posttrain_trainer.drawing import Drawn
from posttrain_trainer.policy_losses import TIS_MOST
from posttrain_trainer.rollout_metrics import metrics_of

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own
GIVEN = online.rollout()
AGGREGATIONS = {"Token": "dapo", "Sequence": "grpo", "Constant": "dr_grpo"}
CLIPS = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


@pytest.fixture(scope="module")
def models() -> Models:
    return online.models()


@pytest.fixture(scope="module")
def trainer(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return online.grpo(models, tmp_path_factory.mktemp("grpo"))


def _told(trainer: Any, settings: GRPOConfig) -> Any:
    """TRL with our settings, as its constructor would have them."""
    trainer.loss_type, trainer.beta = AGGREGATIONS[settings.loss_aggregation], settings.beta
    trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta = (
        settings.clip_low,
        settings.clip_high,
        settings.dual_clip,
    )
    trainer.importance_sampling_level = settings.importance_level.lower()
    trainer.scale_rewards = settings.scale_rewards.lower()
    trainer.mask_truncated_completions = settings.mask_truncated
    trainer.use_vllm = settings.sampler_correction != "None"
    masked = settings.sampler_correction == "IcePop"
    trainer.vllm_importance_sampling_mode = "token_mask" if masked else "token_truncate"
    trainer.vllm_importance_sampling_clip_min = 0.5 if masked else None
    trainer.vllm_importance_sampling_clip_max = 5.0 if masked else 3.0
    return trainer


def _same(trainer: Any, models: Models, settings: GRPOConfig, *names: str, temperature: float = 1.0) -> None:
    theirs = online.theirs(_told(trainer, settings), GIVEN, models)
    found = online.experience(GIVEN, models, temperature)
    ours = online.ours(GRPO(settings, MOST), found, models, temperature)
    kit.assert_same(ours, theirs.side)
    kit.assert_metrics(ours, theirs.side, ("entropy", *CLIPS, *names))


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=named)
def test_aggregations_in_the_second_pass(aggregation: Any, beta: float, trainer: Any, models: Models) -> None:
    settings = GRPOConfig(loss_aggregation=aggregation, beta=beta, group_size=4, iterations=2)
    _same(trainer, models, settings, *(["kl"] if beta else []))


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=named)
def test_one_update_per_rollout(aggregation: Any, beta: float, trainer: Any, models: Models) -> None:
    """Nobody has the old log-probabilities, and the ratio is 1 with a gradient."""
    settings = GRPOConfig(loss_aggregation=aggregation, beta=beta, group_size=4)
    theirs = online.theirs(_told(trainer, settings), GIVEN, models, old=False)
    found = online.without_old(online.experience(GIVEN, models))
    kit.assert_same(online.ours(GRPO(settings, MOST), found, models), theirs.side)


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=named)
def test_gspo(aggregation: Any, trainer: Any, models: Models) -> None:
    settings = GRPOConfig(importance_level="Sequence", loss_aggregation=aggregation, clip_low=0.05, clip_high=0.05)
    _same(trainer, models, settings)


FAMILY = {
    "clip-higher": GRPOConfig(clip_low=0.2, clip_high=0.28),
    "dual clip": GRPOConfig(dual_clip=1.5),
    "dual clip by sequence": GRPOConfig(dual_clip=1.1, clip_high=0.05, importance_level="Sequence"),
    "TIS": GRPOConfig(sampler_correction="TIS", beta=0.1),
    "IcePop": GRPOConfig(sampler_correction="IcePop", beta=0.1),
    "IcePop, GSPO": GRPOConfig(sampler_correction="IcePop", importance_level="Sequence", loss_aggregation="Sequence"),
    "scaled by the batch": GRPOConfig(scale_rewards="Batch"),
    "not scaled": GRPOConfig(scale_rewards="None", loss_aggregation="Constant"),
}


@pytest.mark.parametrize("name", FAMILY, ids=named)
def test_family(name: str, trainer: Any, models: Models) -> None:
    _same(trainer, models, FAMILY[name])


@pytest.mark.parametrize("correction", ["TIS", "IcePop"])
def test_correction_is_reported(correction: Any, trainer: Any, models: Models) -> None:
    settings = GRPOConfig(sampler_correction=correction)
    names = [f"sampling/importance_sampling_ratio/{name}" for name in ("min", "mean", "max")]
    _same(trainer, models, settings, *names)


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=named)
def test_masked_completions(aggregation: Any, trainer: Any, models: Models) -> None:
    """They leave the tokens' number and stay among the sequences."""
    _same(trainer, models, GRPOConfig(mask_truncated=True, loss_aggregation=aggregation, beta=0.1))


@pytest.mark.parametrize("scale", ["Group", "Batch", "None"], ids=named)
def test_advantages(scale: Any, trainer: Any, models: Models) -> None:
    settings = GRPOConfig(scale_rewards=scale)
    theirs = online.theirs(_told(trainer, settings), GIVEN, models).inputs["advantages"]
    found = online.experience(GIVEN, models)
    ours = GRPO(settings, MOST).estimate(found, 0.0).each["advantage"]
    np.testing.assert_allclose(ours, online.by_token(theirs.tolist(), found), rtol=1e-5, atol=1e-6)
    assert np.unique(ours).size > 6  # among them 0, of the group without variance and of the skipped


def test_temperature(models: Models, tmp_path: Any) -> None:
    trainer = online.grpo(models, tmp_path, temperature=0.7)
    _same(trainer, models, GRPOConfig(beta=0.1), "kl", temperature=0.7)


def test_overlong_penalty() -> None:
    from trl.rewards import get_soft_overlong_punishment

    sizes = np.arange(1, MOST + 1)
    theirs = get_soft_overlong_punishment(max_completion_len=MOST, soft_punish_cache=4)
    found = overlong(sizes, MOST, OverlongPenalty(buffer_tokens=4))
    assert found.tolist() == theirs([[2] * int(size) for size in sizes])


def test_what_is_reported_of_rewards(trainer: Any, models: Models) -> None:
    theirs = online.theirs(_told(trainer, GRPOConfig()), GIVEN, models).side.metrics
    drawn = Drawn(online.experience(GIVEN, models), np.zeros(16, dtype=np.int64), {}, {})
    ours = metrics_of(drawn, ("_no_reward", "other"))
    for name in ("reward", "reward_std"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    # One group of four has equal rewards, and one only a single reward, which TRL does not count.
    assert (ours["frac_reward_zero_std"], theirs["frac_reward_zero_std"]) == (0.5, 0.25)


# What is meant to differ.


def test_the_ratio_is_not_a_factor_of_k3(trainer: Any, models: Models) -> None:
    """TRL's use_bias_correction_kl, on unless it is switched off; equation 3 of GRPO's paper does not have it."""
    from trl import GRPOConfig as Theirs

    settings = GRPOConfig(beta=0.1)
    trainer.args.use_bias_correction_kl = True
    theirs = online.theirs(_told(trainer, settings), GIVEN, models).side
    trainer.args.use_bias_correction_kl = False
    ours = online.ours(GRPO(settings, MOST), online.experience(GIVEN, models), models)
    assert abs(ours.loss - theirs.loss) > 1e-3
    assert Theirs.__dataclass_fields__["use_bias_correction_kl"].default is True


def test_icepop_has_a_lower_bound() -> None:
    """TRL's masks have none unless it is given one, and by default look at whole sequences."""
    from trl import GRPOConfig as Theirs

    fields = {name: each.default for name, each in Theirs.__dataclass_fields__.items()}
    assert fields["vllm_importance_sampling_clip_min"] is None
    assert fields["vllm_importance_sampling_mode"] == "sequence_mask"
    assert fields["vllm_importance_sampling_clip_max"] == TIS_MOST
    assert GRPOConfig().sampler_correction == "None"


def test_metrics_that_are_left_out(trainer: Any, models: Models) -> None:
    theirs = online.theirs(_told(trainer, GRPOConfig()), GIVEN, models).side.metrics
    ours = online.ours(GRPO(GRPOConfig(), MOST), online.experience(GIVEN, models), models).metrics
    missing = {name for name in theirs if name.split("/")[0] in ("clip_ratio", "entropy", "kl")} - ours.keys()
    assert missing == {"clip_ratio/low_min", "clip_ratio/high_max"}
