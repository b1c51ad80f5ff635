"""The models that stage RL asks beside its policy and reference: reward models, and what PPO's critic begins as.

Called by `prepare`: fetched, checked and pinned before any rank starts. All of them read the policy's tokens, so they
must have its vocabulary: with another one they load, run, and score other words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from posttrain_api.places import Source
from posttrain_api.reasons import Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.adapters import read_adapter
from posttrain_trainer.errors import TrainerFailure, describe
from posttrain_trainer.fetch import Fetcher
from posttrain_trainer.model_files import CONFIG, weight_files
from posttrain_trainer.model_start import StartModel, given_model
from posttrain_trainer.prepared import PreparedModel
from posttrain_trainer.score_model import HEAD, pad_token


@dataclass(frozen=True)
class ScoringModels:
    """`rewards` by the reward's name; `critic`: what it begins as where that is not the policy."""

    rewards: Mapping[str, StartModel]
    critic: StartModel | None = None

    @property
    def all(self) -> tuple[StartModel, ...]:
        """Each once."""
        own = () if self.critic is None or self.critic in self.rewards.values() else (self.critic,)
        return (*self.rewards.values(), *own)

    def manifest(self) -> dict[str, Any]:
        """Their fields of `Prepared`."""
        critic = self.critic
        return {
            "reward_models": {name: _prepared(model) for name, model in self.rewards.items()},
            "critic_dir": str(critic.folder) if critic else None,
            "critic_digest": critic.digest if critic else None,
            "critic_adapters": critic.adapters if critic else (),
        }


def scoring_models(config: TrainerConfig, fetcher: Fetcher, policy: StartModel) -> ScoringModels:
    """TrainerFailure(ModelIncompatible), with the reward's name, where one is no reward model, has more than one
    output or another vocabulary than the policy."""
    if config.stage != "RL":
        return ScoringModels({})
    rewards = {
        reward.name: _reward(config, fetcher, policy, _Asked(f"reward {reward.name!r}", *_place(reward.model)))
        for reward in config.rewards
        if reward.model is not None
    }
    return ScoringModels(rewards, _critic(config, fetcher, policy, rewards))


@dataclass(frozen=True)
class _Asked:
    """What a model is for, and where it is."""

    role: str
    source: Source
    adapters: tuple[Source, ...]


def _place(given: Any) -> tuple[Source, tuple[Source, ...]]:
    return given.source, given.adapters


def _reward(config: TrainerConfig, fetcher: Fetcher, policy: StartModel, asked: _Asked) -> StartModel:
    model = _fetched(config, fetcher, policy, asked)
    pad_token(policy.tokenizer, len(policy.tokenizer), policy.where)
    chain = zip(model.adapters, asked.adapters, strict=True)
    if any(read_adapter(Path(adapter.dir), source.uri).scores for adapter, source in chain):
        return model
    outputs = _outputs(model)
    if outputs != 1:
        what = f"its head {HEAD!r} has {outputs} outputs" if outputs else f"its weights have no head {HEAD!r}"
        raise _unfit(
            asked,
            f"{what}. A reward model is a sequence classifier with one label: name the output of a job of stage "
            "RewardModel, or a model like it",
        )
    return model


def _critic(
    config: TrainerConfig, fetcher: Fetcher, policy: StartModel, rewards: Mapping[str, StartModel]
) -> StartModel | None:
    critic = config.critic
    if critic is None or config.algorithm != "PPO":
        return None
    if critic.source is not None:
        return _fetched(config, fetcher, policy, _Asked("critic", critic.source, critic.adapters))
    if critic.init_from == "Policy":
        return None
    if len(rewards) != 1:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"critic.initFrom is RewardModel, and {len(rewards)} rewards are models: it needs exactly one. Set "
            "initFrom: Policy, or critic.model.",
        )
    return next(iter(rewards.values()))


def _fetched(config: TrainerConfig, fetcher: Fetcher, policy: StartModel, asked: _Asked) -> StartModel:
    given = {"source": asked.source, "adapters": asked.adapters, "scratch": None}
    model = given_model(config.model.model_copy(update=given), fetcher)
    theirs, ours = model.tokenizer.get_vocab(), policy.tokenizer.get_vocab()
    if theirs != ours:
        token = min(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
        raise _unfit(
            asked,
            f"it has another tokenizer than the policy, {policy.where}: {token!r} is id {theirs.get(token)} in it and "
            f"{ours.get(token)} in the policy's. Use a model that was trained with the policy's tokenizer",
        )
    return model


def _outputs(model: StartModel) -> int:
    """Outputs of the head in the files' headers; 0: there is none. Of files without headers what config.json says,
    which has no number where it is transformers' own, 2."""
    files = weight_files(model.folder, model.where)
    if all(file.suffix == ".safetensors" for file in files):
        return next(_heads(files, model.where), 0)
    settings = json.loads((model.folder / CONFIG).read_text())
    classifies = any(name.endswith("ForSequenceClassification") for name in settings.get("architectures") or ())
    return len(settings.get("id2label") or (0, 1)) if classifies else 0


def _heads(files: list[Path], where: str) -> Iterator[int]:
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                if f"{HEAD}.weight" in tensors.keys():  # noqa: SIM118
                    yield int(tensors.get_slice(f"{HEAD}.weight").get_shape()[0])
        except SafetensorError as error:
            raise TrainerFailure(
                Reason.MODEL_INCOMPATIBLE, f"{where}: {file} is no safetensors file ({describe(error)}). Copy it again."
            ) from error


def _unfit(asked: _Asked, what: str) -> TrainerFailure:
    return TrainerFailure(Reason.MODEL_INCOMPATIBLE, f"{asked.role}: {asked.source.uri}: {what}.")


def _prepared(model: StartModel) -> PreparedModel:
    return PreparedModel(dir=str(model.folder), digest=model.digest, adapters=model.adapters, revision=model.revision)
