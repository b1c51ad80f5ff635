"""prepare for stage RL: prompt sets, stop tokens, the models of rewards and critic, steps and memory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from prepare_kit import job, model_folder, model_source, small_tokenizer, source, write_jsonl

from posttrain_api.online import (
    AdaptiveKL,
    ColumnReward,
    CriticConfig,
    GRPOConfig,
    LengthReward,
    ModelReward,
    PPOConfig,
    PythonReward,
    RewardConfig,
    RLOOConfig,
    RolloutConfig,
)
from posttrain_api.places import Source
from posttrain_api.reasons import Reason
from posttrain_api.trainer import JobIdentity, LoraConfig, PreferenceConfig, ReferenceConfig, Topology, TrainerConfig
from posttrain_trainer import tokenizer as tokenizers_
from posttrain_trainer.algorithms import online_of
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.model import check_unchanged
from posttrain_trainer.prepare import prepare
from posttrain_trainer.prompts import PromptSet
from posttrain_trainer.resolve import Facts, asks_reference, resolve, second_reference

RIGHT = RewardConfig(name="right", exact_match=ColumnReward(column="answer"))
LORA = LoraConfig(rank=8, alpha=16, dropout=0, target_modules=("all-linear",))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_folder(tmp_path_factory.mktemp("models") / "reward")


def reward_folder(folder: Path, labels: int = 1, positions: int = 96) -> Path:
    """A tiny sequence classifier with the policy's tokenizer."""
    chosen = small_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(chosen),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        pad_token_id=chosen.pad_token_id,
        num_labels=labels,
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    chosen.save_pretrained(folder)
    return folder


def questions(count: int) -> list[dict[str, Any]]:
    """Sums and their results."""
    return [{"question": f"what is {i} plus {i}? ", "answer": str(2 * i)} for i in range(count)]


def rl_job(tmp_path: Path, model: Path, rows: list[Any], **fields: Any) -> TrainerConfig:
    """A GRPO job on these questions, 16 new tokens of 64."""
    train = write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    given = {
        "stage": "RL",
        "algorithm": "GRPO",
        "model": model_source(model),
        "rewards": (RIGHT,),
        "rollout": RolloutConfig(batch_size=8, max_new_tokens=16),
        **fields,
    }
    return job(tmp_path, [source(train, columns={"prompt": "question"})], **given)


def place(folder: Path) -> Source:
    """The source of a model folder."""
    return Source(uri=f"pvc://models/{folder.name}", path=str(folder))


def judged_by(folder: Path, name: str = "judge") -> RewardConfig:
    """A model reward."""
    return RewardConfig(name=name, model=ModelReward(source=place(folder)))


def failure_of(config: TrainerConfig) -> TrainerFailure:
    with pytest.raises(TrainerFailure) as caught:
        prepare(config)
    return caught.value


def test_a_job_is_prepared(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = rl_job(tmp_path, model, questions(20))
    held_out = write_jsonl(tmp_path / "data" / "eval.jsonl", questions(3))
    evaluation = (source(held_out, columns={"prompt": "question"}),)
    with caplog.at_level(logging.INFO):
        prepared = prepare(config.model_copy(update={"data": config.data.model_copy(update={"eval": evaluation})}))
    tokenizer = small_tokenizer()
    prompts = PromptSet(Path(prepared.train_dir))
    assert len(prompts) == 20
    assert tokenizer.decode(prompts.prompt(7)) == "what is 7 plus 7? "
    assert prompts.columns(7) == {"answer": "14"}
    assert prepared.eval_dir is not None
    assert len(PromptSet(Path(prepared.eval_dir))) == 3
    assert prepared.stop_tokens == (tokenizer.eos_token_id,)
    assert (prepared.data_report.used, prepared.data_report.counted_tokens) == (20, 0)
    assert prepared.resolved.total_steps == 3
    assert prepared.reward_models == {}
    assert (prepared.critic_dir, prepared.critic_digest) == (None, None)
    shown = (Path(prepared.train_dir).parent / "preflight.txt").read_text()
    assert shown.partition("reward right: ")[0] in caplog.text
    assert "reward right: tried on 11 rows with" in shown
    assert "stop tokens: a completion ends with the first of '<|endoftext|>'" in shown
    assert "train.jsonl line 3: " in shown
    assert "prompt: 'what is 2 plus 2? '" in shown
    assert 'columns for the rewards: {"answer": "4"}' in shown


def test_messages_need_a_chat_template(tmp_path: Path, model: Path) -> None:
    """Its end of an answer is a stop token."""
    rows = [
        {"question": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in questions(8)
    ]
    bare = model_folder(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    failure = failure_of(rl_job(tmp_path, bare, rows))
    assert failure.reason is Reason.MODEL_INCOMPATIBLE
    assert "the tokenizer has no chat template" in failure.message
    own = model_source(model).model_copy(
        update={"chat_template": tokenizers_.CHAT_TEMPLATE.replace("+ eos_token", "+ '<|user|>'")}
    )
    prepared = prepare(rl_job(tmp_path, model, rows).model_copy(update={"model": own}))
    words = small_tokenizer()
    assert prepared.stop_tokens == (words.convert_tokens_to_ids("<|user|>"), words.eos_token_id)


def test_a_wrong_row_of_eval_is_refused_too(tmp_path: Path, model: Path) -> None:
    config = rl_job(tmp_path, model, questions(8))
    held_out = write_jsonl(tmp_path / "data" / "eval.jsonl", [{"question": "what is 1 plus 1? "}])
    evaluation = (source(held_out, columns={"prompt": "question"}),)
    failure = failure_of(config.model_copy(update={"data": config.data.model_copy(update={"eval": evaluation})}))
    assert failure.reason is Reason.DATASET_SCHEMA_INVALID
    assert "eval.jsonl: exactMatch.column of reward 'right' is 'answer'" in failure.message


def test_the_cache_knows_columns_and_rewards(tmp_path: Path, model: Path) -> None:
    """A second job takes the set with its records; one whose reward names a column judges the rows anew."""
    rows = [*questions(12), {"question": "what is 1 plus 2? "}]
    named = {"rewards": (RIGHT,), "data": {"bad_rows_policy": "Skip", "bad_rows_max_fraction": 0.2}}
    unnamed = {**named, "rewards": (RewardConfig(name="short", length=LengthReward(max_tokens=9)),)}
    used = []
    for uid, fields in (("1", named), ("2", named), ("3", unnamed)):
        config = rl_job(tmp_path, model, rows, **fields)
        identity = JobIdentity(namespace="test", name="job", uid=uid)
        config = config.model_copy(update={"job": identity, "run_dir": str(tmp_path / "claim" / "job" / uid)})
        prepared = prepare(config)
        used.append(prepared.data_report.used)
        assert PromptSet(Path(prepared.train_dir)).columns(3) == {"answer": "6"}
        shown = (Path(prepared.train_dir).parent / "preflight.txt").read_text()
        assert 'columns for the rewards: {"answer": "4"}' in shown
    assert used == [12, 12, 13]
    assert len(list((tmp_path / "claim" / ".posttrain-cache" / "tokens").iterdir())) == 2


def test_models_of_rewards_and_critic_are_pinned(tmp_path: Path, model: Path, reward_model: Path) -> None:
    config = rl_job(
        tmp_path,
        model,
        questions(8),
        algorithm="PPO",
        rewards=(RIGHT, judged_by(reward_model)),
        critic=CriticConfig(init_from="RewardModel"),
        data={"max_length": 200},
    )
    prepared = prepare(config)
    judge = prepared.reward_models["judge"]
    assert (judge.dir, judge.adapters, judge.revision) == (str(reward_model), (), None)
    assert judge.digest.startswith("sha256:")
    assert (prepared.critic_dir, prepared.critic_digest) == (judge.dir, judge.digest)
    policy = prepare(rl_job(tmp_path, model, questions(8), algorithm="PPO", critic=CriticConfig()))
    assert policy.critic_dir is None
    given = prepare(rl_job(tmp_path, model, questions(8), algorithm="PPO", critic=CriticConfig(source=place(model))))
    assert (given.critic_dir, given.critic_digest) == (str(model), given.model_digest)


@pytest.mark.parametrize("changed", ["judge", "critic", "reference"])
def test_a_later_attempt_sees_that_a_model_has_changed(tmp_path: Path, model: Path, changed: str) -> None:
    folders = {"judge": reward_folder(tmp_path / "judge"), "critic": reward_folder(tmp_path / "critic")}
    folders["reference"] = model_folder(tmp_path / "reference")
    config = rl_job(
        tmp_path,
        model,
        questions(8),
        algorithm="PPO",
        rewards=(judged_by(folders["judge"]),),
        critic=CriticConfig(source=place(folders["critic"])),
        reference=ReferenceConfig(source=place(folders["reference"])),
    )
    prepared = prepare(config)
    check_unchanged(config, prepared)
    settings = folders[changed] / "config.json"
    settings.write_text(settings.read_text() + "\n")
    with pytest.raises(TrainerFailure, match=f"{changed}: its files changed") as caught:
        check_unchanged(config, prepared)
    assert caught.value.reason is Reason.MODEL_INCOMPATIBLE


def test_the_shortest_model_limits_prompts(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = reward_folder(tmp_path / "short", positions=40)
    failure = failure_of(
        rl_job(tmp_path, model, questions(8), rewards=(judged_by(short),), rollout=RolloutConfig(max_new_tokens=39))
    )
    assert "the model's 40 positions less rollout.maxNewTokens 39" in failure.message
    assert "data.maxLength is 64, the model has 40 positions" in caplog.text


def _other_tokenizer(folder: Path) -> Path:
    reward_folder(folder)
    for file in folder.glob("tokenizer*.json"):
        file.write_text(file.read_text().replace("<|user|>", "<|human|>"))
    return folder


def _two_labels(folder: Path) -> Path:
    return reward_folder(folder, labels=2)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_other_tokenizer, "it has another tokenizer than the policy, pvc://models/tiny: '<|human|>' is id"),
        (_two_labels, "its head 'score' has 2 outputs. A reward model is a sequence classifier with one label"),
        (model_folder, "its weights have no head 'score'. A reward model is"),
    ],
)
def test_what_is_no_reward_model_of_this_policy(
    tmp_path: Path, model: Path, make: Callable[[Path], Path], said: str
) -> None:
    failure = failure_of(rl_job(tmp_path, model, questions(8), rewards=(judged_by(make(tmp_path / "wrong")),)))
    assert failure.reason is Reason.MODEL_INCOMPATIBLE
    assert failure.message.startswith("reward 'judge': pvc://models/wrong: ")
    assert said in failure.message


def test_weights_without_headers_are_judged_by_their_configuration(tmp_path: Path, model: Path) -> None:
    folder = reward_folder(tmp_path / "old")
    weights = transformers.LlamaForSequenceClassification.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    config = rl_job(tmp_path, model, questions(8), rewards=(judged_by(folder),))
    assert prepare(config).reward_models["judge"].dir == str(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "architectures": ["LlamaForCausalLM"]}))
    changed = config.model_copy(update={"grace_seconds": 99})
    assert "its weights have no head 'score'" in failure_of(changed).message


def test_a_critic_with_another_tokenizer(tmp_path: Path, model: Path) -> None:
    critic = CriticConfig(source=place(_other_tokenizer(tmp_path / "wrong")))
    failure = failure_of(rl_job(tmp_path, model, questions(8), algorithm="PPO", critic=critic))
    assert failure.reason is Reason.MODEL_INCOMPATIBLE
    assert failure.message.startswith("critic: pvc://models/wrong: it has another tokenizer")


@pytest.mark.parametrize("names", [(), ("one", "two")])
def test_a_critic_begins_as_the_only_reward_model(
    tmp_path: Path, model: Path, reward_model: Path, names: tuple[str, ...]
) -> None:
    rewards = (RIGHT, *(judged_by(reward_model, name) for name in names))
    critic = CriticConfig(init_from="RewardModel")
    failure = failure_of(rl_job(tmp_path, model, questions(8), algorithm="PPO", rewards=rewards, critic=critic))
    assert failure.reason is Reason.MODEL_INCOMPATIBLE
    assert f"{len(names)} rewards are models: it needs exactly one" in failure.message


@pytest.mark.parametrize(
    ("rows", "training", "steps"),
    [(100, {}, 13), (100, {"epochs": 2.0}, 25), (100, {"epochs": None, "max_steps": 7}, 7), (3, {}, 1)],
)
def test_a_step_is_a_rollout(tmp_path: Path, rows: int, training: dict[str, Any], steps: int) -> None:
    config = job(tmp_path, tmp_path / "x", stage="RL", rollout=RolloutConfig(batch_size=8), training=training)
    assert resolve(config, Facts(rows, 0, None, None)).total_steps == steps


NO_KL = {"ppo": PPOConfig(kl_coefficient=0.0), "rloo": RLOOConfig(kl_coefficient=0.0)}
FOLLOWED = PPOConfig(kl_coefficient=0.0, adaptive_kl=AdaptiveKL(target=6.0))
OTHER = ReferenceConfig(source=Source(uri="pvc://models/other"))
ADAPTED = {"tuning": "LoRA", "lora": LORA}


@pytest.mark.parametrize(
    ("fields", "asked", "second"),
    [
        ({"stage": "SFT"}, False, False),
        ({"stage": "Preference", "algorithm": "DPO"}, True, True),
        ({"stage": "Preference", "algorithm": "DPO", **ADAPTED}, True, False),
        ({"stage": "Preference", "algorithm": "SimPO"}, False, False),
        (
            {"stage": "Preference", "algorithm": "DPO", "preference": PreferenceConfig(cache_reference=True)},
            False,
            False,
        ),
        ({"stage": "RL"}, False, False),
        ({"stage": "RL", "algorithm": "GRPO"}, False, False),
        ({"stage": "RL", "algorithm": "GRPO", "grpo": GRPOConfig(beta=0.1)}, True, True),
        ({"stage": "RL", "algorithm": "PPO"}, True, True),
        ({"stage": "RL", "algorithm": "RLOO"}, True, True),
        ({"stage": "RL", "algorithm": "PPO", **NO_KL}, False, False),
        ({"stage": "RL", "algorithm": "RLOO", **NO_KL}, False, False),
        ({"stage": "RL", "algorithm": "PPO", "ppo": FOLLOWED}, True, True),
        ({"stage": "RL", "algorithm": "PPO", **ADAPTED}, True, False),
        ({"stage": "RL", "algorithm": "PPO", **ADAPTED, "reference": OTHER}, True, True),
        (
            {
                "stage": "RL",
                "algorithm": "PPO",
                "tuning": "LoRA",
                "lora": LORA.model_copy(update={"continue_adapter": True}),
            },
            True,
            True,
        ),
    ],
)
def test_which_jobs_have_a_reference(tmp_path: Path, fields: dict[str, Any], asked: bool, second: bool) -> None:
    config = job(tmp_path, tmp_path / "x", **fields)
    assert (asks_reference(config), second_reference(config)) == (asked, second)
    if config.stage == "RL":
        assert online_of(config).needs_reference == asked


GIB = 2**30
EIGHT = Topology(nodes=1, processes_per_node=8, gpus_per_node=8)
BILLION = 10**9


@pytest.mark.parametrize(
    ("facts", "fields", "stage"),
    [
        (Facts(9, BILLION, 80 * GIB, None), {}, 2),
        (Facts(9, BILLION, 80 * GIB, None, frozen=8 * BILLION), {}, 2),
        (Facts(9, BILLION, 80 * GIB, None, frozen=10 * BILLION), {}, 3),
        (Facts(9, BILLION, 80 * GIB, None, critic=6 * BILLION), {}, 2),
        (Facts(9, BILLION, 80 * GIB, None, critic=7 * BILLION), {}, 3),
        (Facts(9, 8 * BILLION, 80 * GIB, None), ADAPTED, 2),
        (Facts(9, 8 * BILLION, 80 * GIB, None, frozen=8 * BILLION), ADAPTED, 3),
    ],
)
def test_other_models_take_memory(tmp_path: Path, facts: Facts, fields: dict[str, Any], stage: int) -> None:
    config = job(tmp_path, tmp_path / "x", stage="RL", algorithm="PPO", topology=EIGHT, **fields)
    assert resolve(config, facts).zero_stage == stage


def test_rewards_are_tried_before_any_rank_starts(tmp_path: Path, model: Path) -> None:
    prepared = prepare(rl_job(tmp_path, model, questions(20)))
    lines = (Path(prepared.train_dir).parent / "preflight.txt").read_text().splitlines()
    assert lines[-1].startswith("reward right: tried on 8 rows with made-up completions, scored 8, mean 1, ")


def test_a_reward_that_cannot_work_is_named(tmp_path: Path, model: Path) -> None:
    (tmp_path / "bad.py").write_text("def score(prompts, completions, level, **columns):\n    return [1.0]\n")
    bad = RewardConfig(name="mine", python=PythonReward(path=str(tmp_path / "bad.py"), function="score"))
    failure = failure_of(rl_job(tmp_path, model, questions(8), rewards=(RIGHT, bad)))
    assert failure.reason is Reason.REWARD_ERROR
    assert failure.message.startswith("reward 'mine': bad.py raised TypeError")


def test_an_answer_that_no_math_reward_reads(tmp_path: Path, model: Path) -> None:
    rows = [{**row, "answer": "who knows"} for row in questions(8)]
    right = RewardConfig(name="right", math=ColumnReward(column="answer"))
    failure = failure_of(rl_job(tmp_path, model, rows, rewards=(right,)))
    assert failure.reason is Reason.REWARD_ERROR
    assert "reward 'right': none of 8 rows has an answer in the column 'answer' that can be read" in failure.message
