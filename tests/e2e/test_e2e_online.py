"""Stage RL on a cluster: GRPO with a user's function on two processes, PPO with a reward model and a critic, and a
function that fails."""

from __future__ import annotations

import json

import e2e_models
import pytest
from e2e_kit import TINY_SFT, Bench, Manifest, job

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

STEPS, PATIENCE = 4, 600
PROMPTS = [{"prompt": f"What is {a}+{b}?", "digit": str((a + b) % 10)} for a in range(8) for b in range(4)]
PAIRS = [{"prompt": row["prompt"], "chosen": f" {row['digit']}", "rejected": " no"} for row in PROMPTS]
SCRIPT = """
def digits(prompts, completions, digit, **columns):
    return [float(len(text)) / 100 + (one in text) for text, one in zip(completions, digit)]

def broken(prompts, completions, **columns):
    if not prompts[0].startswith("What is 0+0"):
        raise KeyError("no such table")
    return [0.0] * len(completions)
"""


def _online(
    name: str, algorithm: str, rewards: list[Manifest], held_out: int | None = None, **changes: object
) -> Manifest:
    source = {"uri": "pvc://runs/data/prompts.jsonl"}
    evaluation = {} if held_out is None else {"eval": [{**source, "maxRows": held_out}]}
    made = job(
        name,
        TINY_SFT,
        stage="RL",
        algorithm=algorithm,
        data={"train": [source], "maxLength": 64, **evaluation},
        training={"maxSteps": STEPS, "batchSize": 4, "learningRate": 1e-3},
        rollout={"maxNewTokens": 8, "batchSize": 8},
        **changes,
    )
    made["spec"]["rewards"] = rewards
    return made


def _function(name: str) -> Manifest:
    return {"python": {"configMapRef": {"name": "scores"}, "function": name}}


@pytest.fixture(scope="module")
def online(bench: Bench) -> Bench:
    """All jobs at once."""
    bench.rows("data/prompts.jsonl", PROMPTS)
    bench.rows("data/preferences.jsonl", PAIRS)
    words = e2e_models.tokenizer([row["prompt"] for row in PROMPTS])
    e2e_models.save(bench.volume() / "models" / "good", words)
    script: Manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "scores"}}
    bench.apply(
        {**script, "data": {"reward.py": SCRIPT}},
        job(
            "judge",
            TINY_SFT,
            stage="RewardModel",
            data={"train": [{"uri": "pvc://runs/data/preferences.jsonl"}], "maxLength": 64},
        ),
        _online("grouped", "GRPO", [_function("digits")], grpo={"groupSize": 4}, resources={"gpusPerNode": 2}),
        _online(
            "criticised",
            "PPO",
            [{"model": {"fromJob": {"name": "judge"}}}, {"length": {"maxTokens": 6}, "weight": 0.5}],
            ppo={"epochs": 2},
            held_out=8,
            evaluation={"everySteps": 2, "keepBest": True},
        ),
        _online("failing", "GRPO", [_function("broken")], grpo={"groupSize": 2}),
    )
    return bench


def test_a_users_function_is_learned_from(online: Bench) -> None:
    status = online.succeeded("grouped", PATIENCE)
    lines = online.metrics("grouped")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["rewards/python/mean"] == lines[0]["reward"] > 0
    assert lines[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert any(line["grad_norm"] > 0 for line in lines)
    assert status["progress"]["headline"].startswith("reward ")
    shown = (online.run_folder("grouped") / "completions.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in shown} == set(range(1, STEPS + 1))
    assert status["output"]["format"] == "peft"


def test_a_reward_model_and_a_critic(online: Bench) -> None:
    status = online.succeeded("criticised", PATIENCE)
    lines = online.metrics("criticised")
    assert all(line["critic/loss"] > 0 for line in lines)
    assert "eval_reward" in lines[1]
    assert status["checkpoints"]["best"]["metric"] == "eval_reward"
    assert "judge" in [each["job"] for each in status["lineage"]]


def test_a_function_that_raises_is_named(online: Bench) -> None:
    status = online.finished("failing", PATIENCE)
    assert (status["state"], status["reason"]) == ("Failed", "RewardError"), online.story("failing")
    assert "no such table" in status["message"]
    assert "python" in status["message"]
