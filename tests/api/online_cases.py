"""Accepted and refused jobs of stage RL, for the tables of rule_cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.api.case_kit import Refused

MATH = {"math": {"column": "answer"}}
JUDGE = {"model": {"fromJob": {"name": "judge"}}}
RL: dict[str, Any] = {"spec.stage": "RL", "spec.rewards": [MATH]}
PPO: dict[str, Any] = {**RL, "spec.algorithm": "PPO"}
RLOO: dict[str, Any] = {**RL, "spec.algorithm": "RLOO"}
REFERENCE = {"spec.reference": {"fromJob": {"name": "base"}}}
EVALUATED = {"spec.data.eval": [{"uri": "pvc://datasets/test.jsonl"}]}
PYTHON = {"python": {"configMapRef": {"name": "my-reward"}, "function": "score"}}
EVERY_GRPO = {
    "groupSize": 2,
    "beta": 0.04,
    "clipLow": 0.2,
    "clipHigh": 0.28,
    "dualClip": 3,
    "lossAggregation": "Sequence",
    "importanceLevel": "Sequence",
    "scaleRewards": "Batch",
    "stdDdof": 0,
    "stdEpsilon": 1e-6,
    "iterations": 2,
    "maskTruncated": True,
    "overlongPenalty": {"bufferTokens": 128, "factor": 0.5},
    "dynamicSampling": {"maxRefills": 3},
    "samplerCorrection": "TIS",
}
EVERY_PPO = {
    "clipRange": 0.1,
    "valueClipRange": 0.3,
    "valueCoefficient": 1,
    "gamma": 0.99,
    "lambda": 1,
    "klCoefficient": 0.02,
    "klEstimator": "K3",
    "adaptiveKL": {"target": 6, "horizon": 5000},
    "epochs": 2,
    "whitenAdvantages": False,
    "missingEOSPenalty": 1,
    "lossAggregation": "Token",
}
EVERY_REWARD = [
    {"name": "right", "weight": -0.5, "timeoutSeconds": 0.5, "onError": "Skip", **MATH},
    {"exactMatch": {"column": "label"}, "onError": "Zero"},
    {"format": {"pattern": r"<think>.*</think>\s*.+"}},
    {"regex": {"pattern": "[0-9]+"}},
    {"length": {"minTokens": 4, "maxTokens": 4}},
    JUDGE,
    {"name": "hub", "model": {"uri": "hf://a/b", "secretRef": {"name": "hf-token"}}},
    {"http": {"url": "https://judge.example.com:8443/score?a=b", "secretRef": {"name": "judge-token"}}},
    PYTHON,
]

ACCEPTED_ONLINE: dict[str, Mapping[str, Any]] = {
    "rl": RL,
    "rl with short prompts": {**RL, "spec.data.maxPromptLength": 256},
    "grpo": {**RL, "spec.algorithm": "GRPO", "spec.grpo": EVERY_GRPO},
    "grpo by the block": {**RL, "spec.grpo": {"scaleRewards": "None", "lossAggregation": "Constant"}},
    "ppo": {**PPO, "spec.ppo": EVERY_PPO, "spec.critic": {"warmupSteps": 3, "learningRate": 1e-5}},
    "ppo bare": PPO,
    "rloo": {
        **RLOO,
        "spec.rloo": {"groupSize": 2, "klCoefficient": 0.1, "clipRange": 0.1, "normalizeAdvantages": True},
    },
    "every reward": {**RL, "spec.rewards": EVERY_REWARD},
    "longest answers": {**RL, "spec.rollout": {"maxNewTokens": 1023}, "spec.data.maxLength": 1024},
    "room for both": {**RL, "spec.data": {"train": [{"uri": "pvc://a/b"}], "maxLength": 612, "maxPromptLength": 100}},
    "several updates": {
        **RL,
        "spec.rollout": {
            "engine": "ContinuousBatching", "batchSize": 96, "temperature": 0.7, "topP": 0.9, "topK": 50,
        },
    },
    "several updates, said": {**RL, "spec.rollout": {"batchSize": 30}, "spec.training": {"batchSize": 15}},
    "reference of grpo": {**RL, **REFERENCE, "spec.grpo": {"beta": 0.01}},
    "reference of ppo": {**PPO, **REFERENCE},
    "reference of rloo": {**RLOO, **REFERENCE, "spec.rloo": {"klCoefficient": 0.5}},
    "critic from the reward model": {
        **PPO, "spec.rewards": [MATH, JUDGE], "spec.critic": {"initFrom": "RewardModel"},
    },
    "critic from the policy": {**PPO, "spec.critic": {"initFrom": "Policy"}},
    "critic of its own": {**PPO, "spec.critic": {"model": {"uri": "hf://a/b", "secretRef": {"name": "x"}}}},
    "critic of a job": {**PPO, "spec.critic": {"model": {"fromJob": {"name": "judge"}}}},
    "best by reward": {**RL, **EVALUATED, "spec.evaluation": {"everySteps": 5, "keepBest": True}},
    "best by reward, said": {
        **RL, **EVALUATED, "spec.evaluation": {"everySteps": 5, "keepBest": True, "metric": "eval_reward"},
    },
    "prompts fail": {**RL, "spec.data.tooLong": "Fail"},
    "chat template of prompts": {**RL, "spec.model.chatTemplate": "{{ messages }}"},
    "server in the cluster": {**RL, "spec.rewards": [{"http": {"url": "http://judge.team-a.svc"}}]},
    "server by address": {**RL, "spec.rewards": [{"http": {"url": "http://[fd00::1]:80/x"}}]},
    "key of a script": {
        **RL,
        "spec.rewards": [{"python": {"configMapRef": {"name": "a.b", "key": "my_score.py"}, "function": "_f"}}],
    },
}  # fmt: skip

_RL_ONLY = "is for stage RL only"
_SCHEME = "must be a URI of a scheme that works here"
_ESCAPE = "must not contain a .. step"
_FETCHED = "is for an hf:// or s3:// or gs:// uri only"
_ITSELF = "must not name the job itself"
_ADDRESS = "must be an http:// or https:// address"
_REWARD = "spec.rewards[0]"


def _beside(node: str, path: str, put: Any) -> tuple[Refused, ...]:
    """What is refused of a model beside the policy. `put`: makes the changes that set it."""
    cases = (
        ("two", "", {"uri": "hf://a/b", "fromJob": {"name": "judge"}}, "needs exactly one of uri, fromJob"),
        ("none", "", {}, "needs exactly one of uri, fromJob"),
        ("nowhere", ".uri", {"uri": "a/b"}, _SCHEME),
        ("escapes", ".uri", {"uri": "pvc://a/../b"}, _ESCAPE),
        ("secret of a folder", ".secretRef", {"uri": "pvc://a/b", "secretRef": {"name": "x"}}, _FETCHED),
    )
    return tuple(Refused(f"{node} {name}", put(value), path + field, text) for name, field, value, text in cases)


REFUSED_ONLINE: tuple[Refused, ...] = (
    Refused(
        "dual clip within the clip",
        {**RL, "spec.grpo": {"dualClip": 1.3, "clipHigh": 0.3}},
        "spec.grpo.dualClip",
        "more than 1 + clipHigh",
    ),
    Refused("no rewards", {"spec.stage": "RL"}, "spec.rewards", "is required in stage RL"),
    *(
        Refused(f"{field} in sft", {f"spec.{field}": value}, f"spec.{field}", _RL_ONLY)
        for field, value in (
            ("rewards", [MATH]),
            ("rollout", {"topK": 5}),
            ("grpo", {"groupSize": 8}),
            ("ppo", {"epochs": 1}),
            ("rloo", {"groupSize": 8}),
            ("critic", {"warmupSteps": 1}),
        )
    ),
    *(
        Refused(f"{field} with {name}", {**base, f"spec.{field}": {}}, f"spec.{field}", f"is for algorithm {own} only")
        for name, base, field, own in (
            ("ppo", PPO, "grpo", "GRPO"),
            ("grpo", RL, "ppo", "PPO"),
            ("grpo, said", {**RL, "spec.algorithm": "GRPO"}, "rloo", "RLOO"),
            ("rloo", RLOO, "critic", "PPO"),
            ("grpo", RL, "critic", "PPO"),
        )
    ),
    *(
        Refused(f"{name} of another stage", {**base, "spec.algorithm": name}, "spec.algorithm", "of its stage")
        for name, base in (("DPO", RL), ("SimPO", RL), ("GRPO", {"spec.stage": "Preference"}))
    ),
    *(
        Refused(f"{block} in rl", {**RL, f"spec.{block}": {}}, f"spec.{block}", f"is for stage {stage} only")
        for block, stage in (("preference", "Preference"), ("rewardModel", "RewardModel"))
    ),
    Refused("prompts are cut", {**RL, "spec.data.tooLong": "Truncate"}, "spec.data.tooLong", "is for stages Pretrain"),
    Refused(
        "reference without beta",
        {**RL, **REFERENCE, "spec.grpo": {"beta": 0}},
        "spec.reference",
        "means nothing without a KL",
    ),
    Refused("reference of bare grpo", {**RL, **REFERENCE}, "spec.reference", "means nothing without a KL"),
    *(
        Refused(
            f"reference of {name} without kl",
            {**base, **REFERENCE, f"spec.{name}": {"klCoefficient": 0}},
            "spec.reference",
            "means nothing without a KL",
        )
        for name, base in (("ppo", PPO), ("rloo", RLOO))
    ),
    Refused("no room for a prompt", {**RL, "spec.data.maxLength": 512}, "spec.data.maxLength", "must hold"),
    Refused(
        "no room for both",
        {**RL, "spec.data.maxLength": 1000, "spec.data.maxPromptLength": 501, "spec.rollout": {"maxNewTokens": 500}},
        "spec.data.maxLength",
        "must hold",
    ),
    Refused("half a step", {**RL, "spec.rollout": {"batchSize": 48}}, "spec.rollout.batchSize", "must be a multiple"),
    Refused(
        "less than a step",
        {**RL, "spec.rollout": {"batchSize": 8}, "spec.training": {"batchSize": 16}},
        "spec.rollout.batchSize",
        "must be a multiple",
    ),
    Refused(
        "loss of rl",
        {**RL, **EVALUATED, "spec.evaluation": {"everySteps": 5, "keepBest": True, "metric": "eval_loss"}},
        "spec.evaluation.metric",
        "is not measured in stage RL",
    ),
    *(
        Refused(
            f"gspo {name}", {**RL, "spec.grpo": {"importanceLevel": "Sequence", **more}}, "spec.grpo.importanceLevel",
            "needs lossAggregation: Sequence",
        )
        for name, more in (("bare", {}), ("by tokens", {"lossAggregation": "Token"}))
    ),
    *(
        Refused(
            f"{field} of none",
            {**RL, "spec.grpo": {"scaleRewards": "None", field: value}},
            f"spec.grpo.{field}",
            "means nothing with scaleRewards: None",
        )
        for field, value in (("stdDdof", 1), ("stdEpsilon", 0.1))
    ),
    Refused(
        "buffer longer than the answer",
        {**RL, "spec.grpo": {"overlongPenalty": {"bufferTokens": 513}}},
        "spec.grpo.overlongPenalty.bufferTokens",
        "must not be more than rollout.maxNewTokens",
    ),
    Refused(
        "nothing to adapt",
        {**PPO, "spec.ppo": {"klCoefficient": 0, "adaptiveKL": {"target": 6}}},
        "spec.ppo.adaptiveKL",
        "has nothing to move",
    ),
    Refused(
        "critic of two",
        {**PPO, "spec.critic": {"initFrom": "Policy", "model": {"uri": "hf://a/b"}}},
        "spec.critic.initFrom",
        "excludes model",
    ),
    *(
        Refused(
            f"critic from {name}",
            {**PPO, "spec.rewards": rewards, "spec.critic": {"initFrom": "RewardModel"}},
            "spec.critic.initFrom",
            "needs exactly one reward of kind model",
        )
        for name, rewards in (("no reward model", [MATH]), ("two reward models", [JUDGE, {"name": "b", **JUDGE}]))
    ),
    Refused("no kind", {**RL, "spec.rewards": [{"weight": 2}]}, _REWARD, "needs exactly one of math, exactMatch"),
    Refused("two kinds", {**RL, "spec.rewards": [{**MATH, **JUDGE}]}, _REWARD, "needs exactly one of math, exactMatch"),
    Refused(
        "two rewards of one name",
        {**RL, "spec.rewards": [{"name": "a", **MATH}, {"name": "b", **MATH}, {"name": "a", **JUDGE}]},
        "spec.rewards",
        "must not have two rewards of one name",
    ),
    *(
        Refused(
            f"length {value}", {**RL, "spec.rewards": [{"length": value}]}, f"{_REWARD}.length", "needs minTokens or"
        )
        for value in ({}, {"minTokens": 5, "maxTokens": 4})
    ),
    *(
        Refused(f"server {url!r}", {**RL, "spec.rewards": [{"http": {"url": url}}]}, f"{_REWARD}.http.url", _ADDRESS)
        for url in (
            *("judge", "ftp://judge/x", "http://", "http:///x", "https://me:secret@judge/x", "http://judge/x#y"),
            *("http://judge /x", "http://judge:99999999/", "HTTP://judge", "http://judge\n", "file:///etc/passwd"),
        )
    ),
    *(
        Refused(
            f"time for {kind}",
            {**RL, "spec.rewards": [{"timeoutSeconds": 5, kind: value}]},
            f"{_REWARD}.timeoutSeconds",
            "means nothing for model and length",
        )
        for kind, value in (("model", {"uri": "hf://a/b"}), ("length", {"maxTokens": 5}))
    ),
    Refused(
        "scored by itself", {**RL, "spec.rewards": [{"model": {"fromJob": {"name": "my-job"}}}]}, "spec.rewards",
        _ITSELF,
    ),
    Refused(
        "critic of itself",
        {**PPO, "spec.critic": {"model": {"fromJob": {"name": "my-job"}}}},
        "spec.critic.model.fromJob.name",
        _ITSELF,
    ),
    *_beside("reward", f"{_REWARD}.model", lambda model: {**RL, "spec.rewards": [{"model": model}]}),
    *_beside("critic", "spec.critic.model", lambda model: {**PPO, "spec.critic": {"model": model}}),
)  # fmt: skip

REFUSED_ONLINE_BY_SCHEMA: tuple[Refused, ...] = (
    Refused("group of one", {**RL, "spec.grpo": {"groupSize": 1}}, "spec.grpo.groupSize", "2"),
    Refused("loo of one", {**RLOO, "spec.rloo": {"groupSize": 1}}, "spec.rloo.groupSize", "2"),
    Refused("no reward", {**RL, "spec.rewards": []}, "spec.rewards", "at least 1"),
    Refused("too many rewards", {**RL, "spec.rewards": [MATH] * 17}, "spec.rewards", "at most 16"),
    Refused("cold", {**RL, "spec.rollout": {"temperature": 0}}, "spec.rollout.temperature", "than 0"),
    Refused("no tokens", {**RL, "spec.rollout": {"maxNewTokens": 0}}, "spec.rollout.maxNewTokens", "1"),
    Refused("later engine", {**RL, "spec.rollout": {"engine": "vLLM"}}, "spec.rollout.engine", "Generate"),
    Refused("no column", {**RL, "spec.rewards": [{"math": {}}]}, f"{_REWARD}.math.column", "equired"),
    Refused("name in words", {**RL, "spec.rewards": [{"name": "a b", **MATH}]}, f"{_REWARD}.name", "match"),
    Refused("no time", {**RL, "spec.rewards": [{"timeoutSeconds": 0, **MATH}]}, f"{_REWARD}.timeoutSeconds", "than 0"),
    Refused(
        "no function",
        {**RL, "spec.rewards": [{"python": {"configMapRef": {"name": "a"}}}]},
        f"{_REWARD}.python.function",
        "equired",
    ),
    Refused(
        "key that escapes",
        {**RL, "spec.rewards": [{"python": {"configMapRef": {"name": "a", "key": ".."}, "function": "f"}}]},
        f"{_REWARD}.python.configMapRef.key",
        "match",
    ),
    Refused("no target", {**PPO, "spec.ppo": {"adaptiveKL": {}}}, "spec.ppo.adaptiveKL.target", "equired"),
    Refused("dual clip of 1", {**RL, "spec.grpo": {"dualClip": 1}}, "spec.grpo.dualClip", "than 1"),
    Refused("estimator in words", {**PPO, "spec.ppo": {"klEstimator": "k1"}}, "spec.ppo.klEstimator", "K1"),
)
