"""Stage RL on a real API server: waits for its reward model and its script; tokens of servers are in every pod."""

from __future__ import annotations

from typing import Any

import pytest
from operator_kit import World

from tests.cluster.test_operator_chain import BASE, FOLDER, config_of, finish
from tests.cluster.test_operator_flow import started

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("operator"), pytest.mark.usefixtures("running")]

REWARDS = [
    {"model": {"fromJob": {"name": "judge"}}},
    {"name": "own", "onError": "Skip", "python": {"configMapRef": {"name": "my-reward"}, "function": "score"}},
    {"http": {"url": "http://judge.team-a.svc:8000/score", "secretRef": {"name": "judge-token"}}},
]


def volumes(world: World, role: str) -> set[str]:
    """Names of the Secrets and ConfigMaps that the pods of a role mount, but the job's own."""
    template = world.child("ppo")["spec"]["pytorchReplicaSpecs"][role]["template"]["spec"]
    named = [v.get("secret", {}).get("secretName") or v.get("configMap", {}).get("name") for v in template["volumes"]]
    return {name for name in named if name and not name.startswith("ppo-")}


def test_ppo_with_a_reward_model_of_another_job(world: World) -> None:
    critic = {"initFrom": "RewardModel"}
    world.job("ppo", stage="RL", algorithm="PPO", lora={"rank": 4}, model=BASE, rewards=REWARDS, critic=critic)
    waiting = world.until("ppo", reason="WaitingForDependency")
    assert "judge, which does not exist (yet)" in waiting["message"]

    finish(world, started(world, "judge", stage="RewardModel", lora={"rank": 4}, model=BASE), best=False)
    stalled = world.until("ppo", reason="ConfigMapNotFound")
    assert "ConfigMap my-reward does not exist" in stalled["message"]

    world.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "my-reward"}, "data": {"reward.py": ""}})
    config = config_of(world, "ppo")
    assert volumes(world, "Master") == volumes(world, "Worker") == {"my-reward", "judge-token"}
    model, own, server = config["rewards"]
    assert model["model"]["adapters"][0]["path"] == "/claims/runs/x/u/output"
    assert own["python"] == {"path": "/etc/posttrain/configmaps/my-reward/reward.py", "function": "score"}
    assert server["http"]["secretPath"] == "/etc/posttrain/secrets/judge-token"
    assert config["critic"] == {
        "initFrom": "RewardModel", "adapters": [], "learningRate": pytest.approx(1e-4), "warmupSteps": 0,
        "shared": False,
    }  # fmt: skip
    _shown(world.until("ppo", state="Pending"))


def _shown(status: dict[str, Any]) -> None:
    resolved = status["resolved"]
    assert (resolved["algorithm"], resolved["rollout"]["batchSize"], resolved["ppo"]["lambda"]) == ("PPO", 32, 0.95)
    assert [reward["name"] for reward in resolved["rewards"]] == ["model", "own", "http"]
    assert resolved["rewards"][0]["model"] == {"uri": BASE["uri"], "adapters": [f"{FOLDER}/output"]}
    assert [entry["job"] for entry in status["lineage"]] == ["judge"]


def test_a_policy_that_should_score(world: World) -> None:
    finish(world, started(world, "judge", stage="SFT", lora={"rank": 4}, model=BASE), best=False)
    world.job("grpo", stage="RL", lora={"rank": 4}, model=BASE, rewards=REWARDS[:1])
    status = world.until("grpo", state="Failed", reason="Unsupported")
    assert "spec.rewards[0].model.fromJob.name: names a job of stage SFT" in status["message"]
