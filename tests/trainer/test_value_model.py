"""The critic as a model: what it begins as, and V of the state before each counted token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_kit import make_config, make_model, make_reward_model, prepare, rows, write_tokens

from posttrain_api.reasons import Reason
from posttrain_trainer.critic_model import build_critic, build_policy
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.loading import ModelFolder, load_reward
from posttrain_trainer.lora import adapter_scope, adapter_size, add_adapter
from posttrain_trainer.microbatch import MicroBatch, collate
from posttrain_trainer.packing import use_packed_attention
from posttrain_trainer.prepared import PreparedAdapter
from posttrain_trainer.score_model import ScoreModel
from posttrain_trainer.tokenset import Example, TokenSet, TrainingRow
from posttrain_trainer.value_model import CRITIC, SharedModel, ValueModel

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}


def _job(run_dir: Path, begins: Path | None = None, **changes: Any) -> Any:
    """Configuration and manifest of a PPO job whose policy is a small model."""
    lora = {"tuning": "LoRA", "lora": LORA} if changes.pop("adapter", False) else {}
    config = make_config(run_dir, stage="RL", algorithm="PPO", **{**lora, **changes})
    make_model(run_dir / "model")
    prepared = prepare(config, rows(4))
    if begins is not None:
        prepared = prepared.model_copy(update={"critic_dir": str(begins), "critic_digest": "sha256:c"})
    return config, prepared


def _rows(folder: Path) -> list[TrainingRow]:
    write_tokens(folder, rows(6, seed=4))
    tokens = TokenSet(folder)
    return [tokens[row] for row in range(len(tokens))]


@torch.no_grad()
def _values(model: Any, micro: MicroBatch) -> torch.Tensor:
    values: torch.Tensor = model.eval()(*model.inputs(micro))
    return values


def _drawn(model: Any, seed: int = 5) -> Any:
    """Head and adapters away from zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "head.weight" or "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def test_a_critic_from_the_policy_begins_at_zero(tmp_path: Path) -> None:
    model = build_critic(*_job(tmp_path))
    micro = collate(_rows(tmp_path / "rows"))
    values = _values(model, micro)
    assert values.shape == micro.index.shape
    assert values.dtype is torch.float32
    assert not values.any()
    assert not [name for name, _ in model.named_parameters() if "lm_head" in name]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_values_are_the_head_on_the_state_before_each_token(tmp_path: Path) -> None:
    """One row after the other by transformers alone, with a loop over the positions."""
    model = _drawn(build_critic(*_job(tmp_path))).requires_grad_(False)
    given = _rows(tmp_path / "rows")
    expected = []
    for row in given:
        (example,) = row.examples
        ids = torch.tensor(example.tokens.astype("int64"))[None]
        hidden = model.lm(input_ids=ids, use_cache=False).last_hidden_state[0]
        counted = [at for at in range(1, len(example.tokens)) if example.mask[at]]
        expected += [float(hidden[at - 1] @ model.head.weight[0]) for at in counted]
    assert _values(model, collate(given)).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_packed_and_padded_values_are_equal(tmp_path: Path, adapter: bool) -> None:
    model = _drawn(build_critic(*_job(tmp_path, adapter=adapter)))
    given = _rows(tmp_path / "rows")
    padded = _values(model, collate(given))
    assert use_packed_attention(model)
    packed = _values(model, collate(given, packed=True))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    assert float(padded.std()) > 0.1


@pytest.mark.parametrize("adapter", [False, True])
def test_a_reward_model_says_its_score_of_the_whole(tmp_path: Path, adapter: bool) -> None:
    """V after the last token of a sequence is the reward model's score of it: body and head are both there."""
    make_reward_model(tmp_path / "reward", seed=11)
    config, prepared = _job(tmp_path, tmp_path / "reward", adapter=adapter)
    given = _rows(tmp_path / "rows")
    reward = ScoreModel(load_reward(ModelFolder(tmp_path / "reward"), tmp_path / "reward", 0))
    assert_scores(build_critic(config, prepared), reward, given)


def test_a_reward_models_adapter_brings_body_and_head(tmp_path: Path) -> None:
    """A reward model that was trained as an adapter on a language model."""
    make_model(tmp_path / "base", seed=8)
    config = make_config(tmp_path, stage="RewardModel", tuning="LoRA", lora=LORA)
    assert config.lora is not None
    made: Any = add_adapter(
        load_reward(ModelFolder(tmp_path / "base"), tmp_path / "base", 3), config.lora, 3, scores=True
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    made.save_pretrained(tmp_path / "adapter")
    config, prepared = _job(tmp_path / "run", tmp_path / "base")
    given = (PreparedAdapter(dir=str(tmp_path / "adapter"), digest="sha256:a"),)
    prepared = prepared.model_copy(update={"critic_adapters": given})
    assert_scores(build_critic(config, prepared), ScoreModel(made), _rows(tmp_path / "rows"))


def assert_scores(critic: ValueModel, reward: ScoreModel, given: list[TrainingRow]) -> None:
    """On each row: with one more token behind it, the last value is that of the whole row."""
    longer = []
    for row in given:
        tokens = row.examples[0].tokens
        mask = [0] * len(tokens) + [1]
        longer.append(replace(row, examples=(_example([*tokens.tolist(), 5], mask),)))
    scores = _values(reward, collate(given, whole=True))
    torch.testing.assert_close(_values(critic, collate(longer)), scores, rtol=1e-5, atol=1e-5)
    assert float(scores.std()) > 0.01


def _example(tokens: list[int], mask: list[int]) -> Example:
    return Example(np.array(tokens, dtype=np.int32), np.array(mask, dtype=np.uint8))


def test_under_an_adapter_only_it_and_the_head_learn(tmp_path: Path) -> None:
    model = build_critic(*_job(tmp_path, adapter=True))
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert learning == adapter_size(model, 4) + 32


def _shared(run_dir: Path, **changes: Any) -> SharedModel:
    model = build_policy(*_job(run_dir, adapter=True, critic={"shared": True}, **changes))
    assert isinstance(model, SharedModel)
    return model


def test_a_shared_base_learns_two_adapters_and_a_head(tmp_path: Path) -> None:
    model = _shared(tmp_path)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {".value." in name or name == "head.weight" for name in learning} == {True, False}
    assert all("lora_" in name or name == "head.weight" for name in learning)
    by_role = model.by_role()
    sizes = {role: sum(parameter.numel() for parameter in parameters) for role, parameters in by_role.items()}
    assert sizes["default"] == adapter_size(model, 4)
    assert sizes[CRITIC] == adapter_size(model, 4) + 32
    assert sum(map(len, by_role.values())) == len(learning)


def test_scopes_choose_who_answers_and_touch_nothing_else(tmp_path: Path) -> None:
    model = _drawn(_shared(tmp_path))
    micro = collate(_rows(tmp_path / "rows"))
    before = [parameter.requires_grad for parameter in model.parameters()]

    @torch.no_grad()
    def said() -> Any:
        out = model.eval()(*model.inputs(micro))
        return out if isinstance(out, torch.Tensor) else out[0]

    policy = said()
    with adapter_scope(model, None):
        base = said()
    with model.scope(CRITIC):
        values = said()
        with model.scope("default"):
            assert torch.equal(said(), policy)
        assert torch.equal(said(), values)
    assert torch.equal(said(), policy)
    assert not torch.equal(base, policy)
    assert not torch.equal(values, policy)
    with pytest.raises(ZeroDivisionError), model.scope(CRITIC):
        _ = 1 / 0
    assert torch.equal(said(), policy)
    assert before == [parameter.requires_grad for parameter in model.parameters()]


def test_gradients_stay_with_their_role(tmp_path: Path) -> None:
    model = _drawn(_shared(tmp_path)).train()
    micro = collate(_rows(tmp_path / "rows"))
    with model.scope(CRITIC):
        model(*model.inputs(micro)).square().sum().backward()
    by_role = model.by_role()
    assert all(parameter.grad is None for parameter in by_role["default"])
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in by_role[CRITIC])


def test_an_adapter_on_the_head_is_the_policys_alone(tmp_path: Path) -> None:
    model = _shared(tmp_path, lora={**LORA, "target_modules": ["q_proj", "lm_head"]})
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lm_head" in name]
    assert names
    assert not [name for name in names if ".value." in name]
    alone = build_critic(
        *_job(tmp_path / "other", adapter=True, lora={**LORA, "target_modules": ["q_proj", "lm_head"]})
    )
    assert len([name for name, parameter in alone.named_parameters() if parameter.requires_grad]) == 2 * 2 + 1


@pytest.mark.parametrize("what", ["Full", "source"])
def test_a_shared_base_needs_an_adapter_and_the_policy(tmp_path: Path, what: str) -> None:
    config, prepared = _job(tmp_path, adapter=what != "Full", critic={"shared": True})
    if what == "source":
        prepared = prepared.model_copy(update={"critic_dir": str(tmp_path / "model")})
    with pytest.raises(TrainerFailure, match=r"critic\.shared needs tuning LoRA") as caught:
        build_policy(config, prepared)
    assert caught.value.reason is Reason.IMAGE_INCOMPATIBLE


def test_a_policy_without_a_shared_critic_is_a_plain_scorer(tmp_path: Path) -> None:
    config, prepared = _job(tmp_path, adapter=True)
    assert not isinstance(build_policy(config, prepared), SharedModel)


def test_the_policys_temperature_is_the_rollouts(tmp_path: Path) -> None:
    """In stage RL log-probabilities are of the distribution that is sampled from."""
    config, prepared = _job(tmp_path, rollout__temperature=0.5)
    micro = collate(_rows(tmp_path / "rows"))
    policy: Any = build_policy(config, prepared)
    logits = policy.lm(input_ids=micro.input_ids, use_cache=False).logits.flatten(0, 1)[micro.index]
    expected = (logits / 0.5).log_softmax(-1).gather(1, micro.targets[:, None])[:, 0]
    torch.testing.assert_close(policy(*policy.inputs(micro))[0], expected, rtol=1e-5, atol=1e-5)
