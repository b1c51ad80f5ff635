"""GRPO, RLOO, PPO and its critic on rollouts of a few tokens, computed by hand: what they ask for, what they make of
rewards, and that what does not count does nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from posttrain_api.online import AdaptiveKL, GRPOConfig, OverlongPenalty, PPOConfig, RLOOConfig, RolloutConfig
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.algorithms import algorithm_of, critic_of
from posttrain_trainer.algorithms.critic import Critic
from posttrain_trainer.algorithms.grpo import GRPO
from posttrain_trainer.algorithms.ppo import PPO
from posttrain_trainer.algorithms.rloo import RLOO
from posttrain_trainer.experience import OLD, REFERENCE, ROLLOUT, VALUE, Experience
from posttrain_trainer.microbatch import MicroBatch, collate, dummy

NAN = float("nan")
LN2 = math.log(2)


def _experience(sizes: list[int], rewards: list[float], ended: list[bool] | None = None, **each: Any) -> Experience:
    """Groups of two."""
    flat: dict[str, NDArray[np.float32]] = {name: np.array(values, dtype=np.float32) for name, values in each.items()}
    return Experience(
        prompts=tuple(np.array([4], dtype=np.int32) for _ in sizes),
        completions=tuple(np.arange(5, 5 + size, dtype=np.int32) for size in sizes),
        ended=np.array([True] * len(sizes) if ended is None else ended),
        group=np.arange(len(sizes)) // 2,
        rewards=np.array(rewards, dtype=np.float64)[:, None],
        each=flat,
    )


def _ppo(**changes: Any) -> PPOConfig:
    """No decay, no whitening, no KL, unless it is said."""
    plain = {"lam": 1.0, "kl_coefficient": 0.0, "whiten_advantages": False}
    return PPOConfig(**{**plain, **changes})


def test_grpo_gives_each_token_its_completions_advantage() -> None:
    """(1, 0): mean ½, deviation over n − 1 is √½."""
    found = GRPO(GRPOConfig(std_epsilon=0.0), 8).estimate(_experience([1, 2], [1, 0]), 0.0)
    np.testing.assert_allclose(found.each["advantage"], [0.5**0.5, -(0.5**0.5), -(0.5**0.5)], rtol=1e-6)
    assert found.each.keys() == {"advantage"}
    assert found.metrics == {}


def test_grpo_takes_the_overlong_penalty_off_before_it_compares() -> None:
    """Equal rewards, but one is as long as it may be: −1 and 0."""
    settings = GRPOConfig(scale_rewards="None", overlong_penalty=OverlongPenalty(buffer_tokens=1))
    found = GRPO(settings, 2).estimate(_experience([2, 1], [3, 3]), 0.0)
    assert found.each["advantage"].tolist() == [-0.5, -0.5, 0.5]


def test_grpo_masks_what_was_cut_off_but_compares_with_it() -> None:
    settings = GRPOConfig(scale_rewards="None", mask_truncated=True)
    algorithm, made = GRPO(settings, 2), _experience([2, 1], [1, 0], [False, True])
    found = algorithm.estimate(made, 0.0)
    assert found.each["kept"].tolist() == [0.0, 0.0, 1.0]
    assert found.each["advantage"].tolist() == [0.5, 0.5, -0.5]
    micro = _micro(made.having(**found.each))
    assert algorithm.weights(micro) == {"policy": 1.0}


def test_grpo_corrects_by_what_the_engine_said() -> None:
    """exp(old − rollout) = 2, 4 → 3, ½."""
    each = {OLD: [-1.0, -1.0, -1.0], ROLLOUT: [-1 - LN2, -1 - 2 * LN2, -1 + LN2]}
    algorithm, made = GRPO(GRPOConfig(sampler_correction="TIS"), 2), _experience([2, 1], [1, 0], **each)
    found = algorithm.estimate(made, 0.0)
    np.testing.assert_allclose(found.each["correction"], [2, 3, 0.5], rtol=1e-6)
    ratios = [found.metrics[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max")]
    assert ratios == pytest.approx([0.5, 5.5 / 3, 3.0], rel=1e-6)


def test_rloo_takes_the_divergence_off_the_reward() -> None:
    """R' = 1 − 0.1·(1 + 2) = 0.7 and 0 − 0.1·(−1) = 0.1; the difference both ways."""
    each = {OLD: [-1.0, -1.0, -2.0], REFERENCE: [-2.0, -3.0, -1.0]}
    made = _experience([2, 1], [1, 0], **each)
    found = RLOO(RLOOConfig(kl_coefficient=0.1)).estimate(made, 0.0)
    np.testing.assert_allclose(found.each["advantage"], [0.6, 0.6, -0.6], rtol=1e-6)
    assert found.metrics == {"kl": pytest.approx(2 / 3)}
    np.testing.assert_allclose(RLOO(RLOOConfig(kl_coefficient=0.0)).estimate(made, 0.0).each["advantage"], [1, 1, -1])


def test_rloo_has_no_advantage_where_a_reward_was_skipped() -> None:
    for normalize in (False, True):
        settings = RLOOConfig(kl_coefficient=0.0, normalize_advantages=normalize)
        found = RLOO(settings).estimate(_experience([1, 1, 1, 1], [1, NAN, 3, 1]), 0.0)
        assert found.each["advantage"][:2].tolist() == [0.0, 0.0]
        assert found.each["advantage"][2] == -found.each["advantage"][3] > 0


# d = log π_old − log ref = ln 2 for both tokens. β = ½ comes with the call, not from the settings.
PENALTIES = {"K1": LN2, "K2": LN2**2 / 2, "K3": 0.5 - 1 + LN2}


@pytest.mark.parametrize("estimator", PENALTIES)
def test_ppo_by_hand(estimator: Any) -> None:
    """r = (−β·kl, 1 − β·kl), V = (0.2, 0.4), no decay: R_0 = r_0 + r_1."""
    each = {OLD: [-1.0, -1.0], REFERENCE: [-1 - LN2] * 2, VALUE: [0.2, 0.4]}
    made, penalty = _experience([2], [1], **each), PENALTIES[estimator] / 2
    found = PPO(_ppo(kl_coefficient=0.1, kl_estimator=estimator)).estimate(made, 0.5)
    np.testing.assert_allclose(found.each["return"], [1 - 2 * penalty, 1 - penalty], rtol=1e-6)
    np.testing.assert_allclose(found.each["advantage"], [0.8 - 2 * penalty, 0.6 - penalty], rtol=1e-6)
    expected = {
        "objective/kl": 2 * PENALTIES[estimator],
        "objective/entropy": 2.0,
        "objective/non_score_reward": -2 * penalty,
        "objective/rlhf_reward": 1 - 2 * penalty,
        "objective/scores": 1.0,
    }
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_ppo_is_strict_with_completions_that_do_not_end() -> None:
    made = _experience([1, 1], [1, 1], [True, False], **{OLD: [-1, -1], VALUE: [0, 0]})
    found = PPO(_ppo(missing_eos_penalty=0.75)).estimate(made, 0.0)
    assert found.each["return"].tolist() == [1.0, 0.25]
    assert found.metrics["objective/scores"] == 0.625


def test_ppo_learns_nothing_of_a_skipped_reward() -> None:
    """Neither does its whitening: of the others alone it is the same."""
    each = {OLD: [-1, -1, -2, -1], VALUE: [0.5, 0.1, 0.3, 0.2]}
    settings = _ppo(whiten_advantages=True)
    found = PPO(settings).estimate(_experience([1, 2, 1], [1, NAN, 3], **each), 0.0)
    assert found.each["advantage"][1:3].tolist() == [0.0, 0.0]
    np.testing.assert_array_equal(found.each["return"][1:3], np.array([0.1, 0.3], dtype=np.float32))
    without = _experience([1, 1], [1, 3], **{OLD: [-1, -1], VALUE: [0.5, 0.2]})
    alone = PPO(settings).estimate(without, 0.0)
    np.testing.assert_allclose(found.each["advantage"][[0, 3]], alone.each["advantage"], rtol=1e-6)
    assert found.metrics["val/explained_variance"] == alone.metrics["val/explained_variance"]


def test_ppo_of_skipped_rewards_only() -> None:
    made = _experience([1, 1], [NAN, NAN], **{OLD: [-1, -1], VALUE: [0.5, 0.2]})
    found = PPO(_ppo(whiten_advantages=True)).estimate(made, 0.0)
    assert found.each["advantage"].tolist() == [0.0, 0.0]
    assert all(math.isfinite(value) for value in found.metrics.values())


def test_a_critic_that_knows_the_returns() -> None:
    made = _experience([2, 1], [1, 3], **{OLD: [-1, -1, -1], VALUE: [1, 1, 3]})
    assert PPO(_ppo()).estimate(made, 0.0).metrics["val/explained_variance"] == 1.0


# What each asks for: completions per prompt, passes, the reference, the old policy.
ASKED = [
    pytest.param(GRPO(GRPOConfig(), 8), (8, 1, False, False), id="GRPO"),
    pytest.param(GRPO(GRPOConfig(beta=0.1, iterations=2, group_size=4), 8), (4, 2, True, False), id="GRPO with KL"),
    pytest.param(GRPO(GRPOConfig(sampler_correction="TIS"), 8), (8, 1, False, True), id="GRPO with TIS"),
    pytest.param(RLOO(RLOOConfig()), (4, 1, True, True), id="RLOO"),
    pytest.param(RLOO(RLOOConfig(kl_coefficient=0.0)), (4, 1, False, False), id="RLOO without KL"),
    pytest.param(PPO(PPOConfig()), (1, 4, True, True), id="PPO"),
    pytest.param(PPO(PPOConfig(kl_coefficient=0.0)), (1, 4, False, True), id="PPO without KL"),
    pytest.param(
        PPO(PPOConfig(kl_coefficient=0.0, adaptive_kl=AdaptiveKL(target=1))), (1, 4, True, True), id="PPO, adaptive"
    ),
]


@pytest.mark.parametrize(("algorithm", "asked"), ASKED)
def test_what_is_asked_for(algorithm: Any, asked: tuple[int, int, bool, bool]) -> None:
    found = (algorithm.group_size, algorithm.passes, algorithm.needs_reference, algorithm.needs_old)
    assert found == asked


@pytest.mark.parametrize(("name", "kind"), [("GRPO", GRPO), ("RLOO", RLOO), ("PPO", PPO)])
def test_which_one_a_job_gets(name: Any, kind: type) -> None:
    settings = {"rollout": RolloutConfig(), "grpo": GRPOConfig(), "rloo": RLOOConfig(), "ppo": PPOConfig()}
    config = TrainerConfig.model_construct(stage="RL", algorithm=name, **settings)
    assert isinstance(algorithm_of(config), kind)
    assert isinstance(critic_of(config), Critic) == (name == "PPO")
    assert critic_of(TrainerConfig.model_construct(stage="SFT", algorithm=None)) is None


EVERY = {"advantage": 1.0, "return": 1.0, OLD: -1.0, REFERENCE: -1.0, VALUE: 0.0, "correction": 1.0, "kept": 1.0}
LEARNERS = [
    GRPO(GRPOConfig(beta=0.1), 8),
    GRPO(GRPOConfig(beta=0.1, importance_level="Sequence", loss_aggregation="Sequence"), 8),
    GRPO(GRPOConfig(loss_aggregation="Constant", dual_clip=3.0), 8),
    RLOO(RLOOConfig()),
    PPO(PPOConfig()),
    PPO(PPOConfig(loss_aggregation="Token")),
    Critic(PPOConfig()),
]


def _micro(table: Experience) -> MicroBatch:
    return collate([table[row] for row in range(len(table))])


def _out(algorithm: Any, logp: torch.Tensor) -> Any:
    return (logp, torch.ones_like(logp), torch.ones_like(logp)) if algorithm.needs == "logp" else logp


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_a_dummy_adds_nothing(algorithm: Any) -> None:
    """Its token is in another context than what is known of it: exp of the difference would be infinite."""
    made = _experience([3], [1], **{name: [value] * 3 for name, value in EVERY.items()})
    micro, logp = dummy(made[0]), torch.tensor([-1.0], requires_grad=True)
    far = {**micro.each, OLD: torch.tensor([-200.0]), REFERENCE: torch.tensor([200.0])}
    micro = MicroBatch(**{**vars(micro), "each": far})
    assert set(algorithm.weights(micro).values()) == {0.0}
    losses = algorithm.losses(_out(algorithm, logp), micro)
    (gradient,) = torch.autograd.grad(sum(losses.values()), logp)
    assert [float(each.detach()) for each in losses.values()] == [0.0] * len(losses)
    assert float(gradient) == 0.0
    for name, (value, weight) in algorithm.measures(_out(algorithm, logp), micro).items():
        assert (float(value), float(weight)) == (0.0, 0.0), name


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_terms_and_measures_have_different_names(algorithm: Any) -> None:
    """They are counted together: two sums of one name would be one."""
    made = _experience([3], [1], **{name: [value] * 3 for name, value in EVERY.items()})
    measured = algorithm.measures(_out(algorithm, torch.full((3,), -1.0)), _micro(made))
    assert not measured.keys() & algorithm.terms.keys()
    assert algorithm.losses(_out(algorithm, torch.full((3,), -1.0)), _micro(made)).keys() == algorithm.terms.keys()


def test_ratio_variance_is_around_one() -> None:
    """ρ = 2 and 1 of two tokens: (1 + 0)/2, and a mean of 1½."""
    made = _experience([2], [1], **{"advantage": [0, 0], OLD: [-1 - LN2, -1], VALUE: [0, 0]})
    found = PPO(PPOConfig()).measures(_out(LEARNERS[0], torch.full((2,), -1.0)), _micro(made))
    means = {name: float(value / weight) for name, (value, weight) in found.items()}
    assert means["val/ratio"] == pytest.approx(1.5)
    assert means["val/ratio_var"] == pytest.approx(0.5)
    assert means["policy/approxkl_avg"] == pytest.approx(LN2**2 / 4)
    assert means["policy/entropy_avg"] == 1.0
