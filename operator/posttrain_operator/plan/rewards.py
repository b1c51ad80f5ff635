"""The rewards' records, and what has to be mounted for them: reward models, scripts in ConfigMaps, tokens of servers.

No address is opened and no script is read: that is the trainer's. A pattern is compiled, because a mistake in one is
cheaper here than after the first rollout.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from posttrain_api.online import (
    ColumnReward,
    HTTPReward,
    LengthReward,
    ModelReward,
    PatternReward,
    PythonReward,
    RewardConfig,
)
from posttrain_api.spec.rewards import KINDS, REWARD_FILE, Reward
from posttrain_operator.plan.chain import ModelPlace
from posttrain_operator.plan.context import Context
from posttrain_operator.plan.errors import refuse
from posttrain_operator.plan.model import beside_place
from posttrain_operator.plan.types import PlanSettings


@dataclass(frozen=True)
class RewardPlace:
    """What one reward needs of elsewhere."""

    model: ModelPlace | None = None
    config_maps: frozenset[str] = field(default_factory=frozenset)
    secrets: frozenset[str] = field(default_factory=frozenset)
    """Of a server: every pod calls it."""


def reward_places(context: Context) -> tuple[RewardPlace, ...]:
    """Of each reward, in their order."""
    return tuple(
        _place(context, reward, f"spec.rewards[{index}]") for index, reward in enumerate(context.spec.rewards or ())
    )


def _place(context: Context, reward: Reward, path: str) -> RewardPlace:
    if reward.model:
        return RewardPlace(beside_place(context, reward.model, f"{path}.model", "scores"))
    if reward.python:
        return RewardPlace(config_maps=frozenset({reward.python.config_map_ref.name}))
    token = reward.http.secret_ref if reward.http else None
    return RewardPlace(secrets=frozenset({token.name} if token else ()))


def reward_configs(context: Context, places: tuple[RewardPlace, ...]) -> tuple[RewardConfig, ...]:
    """The trainer's records."""
    rewards = context.spec.rewards or ()
    named = names(rewards)
    return tuple(
        _config(context.settings, reward, place, f"spec.rewards[{index}]").model_copy(update={"name": named[index]})
        for index, (reward, place) in enumerate(zip(rewards, places, strict=True))
    )


def _config(settings: PlanSettings, reward: Reward, place: RewardPlace, path: str) -> RewardConfig:
    said = reward.model_dump(include={"weight", "timeout_seconds", "on_error"}, exclude_none=True)
    return RewardConfig(
        name="",
        **said,
        math=ColumnReward(column=reward.math.column) if reward.math else None,
        exact_match=ColumnReward(column=reward.exact_match.column) if reward.exact_match else None,
        format=_pattern(reward.format.pattern, f"{path}.format.pattern") if reward.format else None,
        regex=_pattern(reward.regex.pattern, f"{path}.regex.pattern") if reward.regex else None,
        length=LengthReward(**reward.length.model_dump()) if reward.length else None,
        model=_model(place.model) if place.model else None,
        http=_http(settings, reward),
        python=_python(settings, reward),
    )


def _pattern(pattern: str, path: str) -> PatternReward:
    try:
        re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise refuse(path, f"is no regular expression of Python's: {error}", pattern, "correct it") from error
    return PatternReward(pattern=pattern)


def _model(place: ModelPlace) -> ModelReward:
    return ModelReward(source=place.base.source, adapters=tuple(adapter.source for adapter in place.adapters))


def _http(settings: PlanSettings, reward: Reward) -> HTTPReward | None:
    if reward.http is None:
        return None
    token = reward.http.secret_ref
    return HTTPReward(
        url=reward.http.url, secret_path=posixpath.join(settings.secrets_dir, token.name) if token else None
    )


def _python(settings: PlanSettings, reward: Reward) -> PythonReward | None:
    if reward.python is None:
        return None
    script = reward.python.config_map_ref
    path = posixpath.join(settings.configmaps_dir, script.name, script.key or REWARD_FILE)
    return PythonReward(path=path, function=reward.python.function)


def names(rewards: Iterable[Reward]) -> tuple[str, ...]:
    """The name of each: said, or its kind, with a number where that is taken."""
    rewards = tuple(rewards)
    taken = {reward.name for reward in rewards if reward.name}
    found = []
    for reward in rewards:
        found.append(reward.name or next(name for name in _candidates(kind_of(reward)) if name not in taken))
        taken.add(found[-1])
    return tuple(found)


def kind_of(reward: Reward) -> str:
    """The one kind that it has."""
    there = reward.to_wire()
    return next(kind for kind in KINDS if kind in there)


def _candidates(kind: str) -> Iterator[str]:
    yield kind
    number = 2
    while True:
        yield f"{kind}_{number}"
        number += 1
