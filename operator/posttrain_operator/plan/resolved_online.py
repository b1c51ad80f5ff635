"""`status.resolved` of stage RL: its blocks under the spec's own names. Called by `resolved`."""

from __future__ import annotations

import posixpath
from typing import Any

from posttrain_api.online import CriticConfig, GRPOConfig, PPOConfig, RewardConfig
from posttrain_api.places import Source
from posttrain_api.trainer import TrainerConfig


def online_values(config: TrainerConfig) -> dict[str, Any]:
    """rollout, rewards, the block of the algorithm, and PPO's critic; nothing in other stages."""
    if config.stage != "RL":
        return {}
    blocks = {"GRPO": ("grpo", _grpo(config.grpo)), "PPO": ("ppo", _ppo(config.ppo))}
    name, block = blocks.get(str(config.algorithm), ("rloo", config.rloo.to_wire()))
    return {
        "rollout": config.rollout.to_wire(),
        "rewards": [_reward(reward) for reward in config.rewards],
        name: block,
        "critic": _critic(config.critic) if config.critic else None,
    }


def _grpo(block: GRPOConfig) -> dict[str, Any]:
    wire = block.to_wire()
    refills = wire.pop("maxRefills")
    return {**wire, **({"dynamicSampling": {"maxRefills": refills}} if refills else {})}


_RENAMED = {"lam": "lambda", "adaptiveKl": "adaptiveKL", "missingEosPenalty": "missingEOSPenalty"}


def _ppo(block: PPOConfig) -> dict[str, Any]:
    return {_RENAMED.get(name, name): value for name, value in block.to_wire().items()}


def _reward(reward: RewardConfig) -> dict[str, Any]:
    wire = reward.to_wire()
    if reward.model or reward.length:  # nobody waits for them
        del wire["timeoutSeconds"]
    if reward.model:
        wire["model"] = place(reward.model.source, reward.model.adapters)
    if reward.http:
        token = reward.http.secret_path
        wire["http"] = {"url": reward.http.url, **({"secretRef": {"name": posixpath.basename(token)}} if token else {})}
    if reward.python:
        folder, key = posixpath.split(reward.python.path)
        script = {"name": posixpath.basename(folder), "key": key}
        wire["python"] = {"configMapRef": script, "function": reward.python.function}
    return wire


def _critic(critic: CriticConfig) -> dict[str, Any]:
    start: dict[str, Any] = {"initFrom": critic.init_from}
    if critic.source:
        start = {"model": place(critic.source, critic.adapters)}
    return {
        **start,
        "learningRate": critic.learning_rate,
        "warmupSteps": critic.warmup_steps,
        "shared": critic.shared,
    }


def place(source: Source, adapters: tuple[Source, ...]) -> dict[str, Any]:
    """A model beside the policy: its URI, and the adapters that are merged into it."""
    merged = [adapter.uri for adapter in adapters]
    return {"uri": source.uri, **({"adapters": merged} if merged else {})}
