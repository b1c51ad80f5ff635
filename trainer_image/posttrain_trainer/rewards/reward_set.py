"""All rewards of a job on one rank: scores with every one of them, and lets all ranks agree on what failed.

Made by assemble, called by the collector. Rules, functions and servers run in a process each (workers.py); the number
of tokens is counted here; models run on all ranks together (model.py). Every rank goes through `score` to its end
whatever went wrong on it, and only then do all raise together: a rank that raised alone would leave the others in a
collective.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from posttrain_api.online import LengthReward, RewardConfig
from posttrain_api.reasons import Reason
from posttrain_trainer.errors import AgreedFailure
from posttrain_trainer.rewards.base import Completion, Scored
from posttrain_trainer.rewards.calls import Batch, Call, Reply, Task
from posttrain_trainer.rewards.workers import Outcome, Worker, call_all, memory_share

log = logging.getLogger(__name__)

Gather = Callable[[Any], list[Any]]
"""Each rank's value, in order of rank; all ranks call it together. `Control.gather`."""
PROCESSES = ("math", "exact_match", "format", "regex", "python", "http")
"""Kinds of rewards, by field of RewardConfig, that are scored in a process of their own."""


class ModelReward(Protocol):
    """A reward model on all ranks."""

    def score(self, completions: Sequence[Completion]) -> Outcome:
        """All ranks call it together."""

    def close(self) -> None:
        """Gives its memory back."""


@dataclass(frozen=True)
class Judged:
    """values float64 [n] after `onError`; failures: completions that it was applied to; why: the first of them;
    fatal: what ends the job."""

    values: NDArray[np.float64]
    failures: int = 0
    why: str | None = None
    fatal: str | None = None


@dataclass
class RewardSet:
    """The rewards `configs`; `models` by name for those that are models. The processes start at once and load
    meanwhile."""

    configs: Sequence[RewardConfig]
    gather: Gather
    models: Mapping[str, ModelReward] = field(default_factory=dict)
    local_ranks: int = 1

    def __post_init__(self) -> None:
        memory = memory_share(self.local_ranks)
        tasks = {config.name: task_of(config) for config in self.configs}
        self._workers = {name: Worker(name, task, memory) for name, task in tasks.items() if task is not None}
        self._noted: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """As in Rewards."""
        return tuple(config.name for config in self.configs)

    @property
    def weights(self) -> tuple[float, ...]:
        """As in Rewards."""
        return tuple(config.weight for config in self.configs)

    def score(self, completions: Sequence[Completion]) -> Scored:
        """As in Rewards. The seconds of processes overlap."""
        outcomes = self.outcomes(completions)
        judged = {
            config.name: judge(config, outcomes[config.name].reply, completions, outcomes[config.name].unusable)
            for config in self.configs
        }
        for name, each in judged.items():
            self._tell(name, outcomes[name].reply, each, len(completions))
        self._agree(next((each.fatal for each in judged.values() if each.fatal), None))
        return Scored(
            values=np.stack([each.values for each in judged.values()], axis=1),
            seconds={name: outcome.seconds for name, outcome in outcomes.items()},
            failures={name: each.failures for name, each in judged.items()},
        )

    def outcomes(self, completions: Sequence[Completion]) -> dict[str, Outcome]:
        """What each reward says by itself, by name."""
        found: dict[str, Outcome] = {}
        batch = batch_of(completions)
        if completions:
            seconds = {config.name: config.timeout_seconds for config in self.configs}
            calls = [(worker, Call(batch, seconds[name])) for name, worker in self._workers.items()]
            found = dict(zip(self._workers, call_all(calls), strict=True))
        for config in self.configs:
            if config.model is not None:
                found[config.name] = self.models[config.name].score(completions)
            elif config.length is not None:
                found[config.name] = Outcome(Reply(within(completions, config.length)), 0.0)
            else:
                found.setdefault(config.name, Outcome(Reply(), 0.0))
        return found

    def close(self) -> None:
        """Ends the processes, gives the models' memory back."""
        for worker in self._workers.values():
            worker.close()
        for model in self.models.values():
            model.close()

    def _agree(self, fatal: str | None) -> None:
        verdicts = self.gather(fatal)
        failed = [rank for rank, verdict in enumerate(verdicts) if verdict is not None]
        if failed:
            ranks = f" (rank {failed[0]}, {len(failed)} of {len(verdicts)} ranks)" if len(verdicts) > 1 else ""
            raise AgreedFailure(Reason.REWARD_ERROR, f"{verdicts[failed[0]]}{ranks}")

    def _tell(self, name: str, reply: Reply, judged: Judged, completions: int) -> None:
        if judged.why is not None and judged.fatal is None:
            log.warning("%s; onError was applied to %d of %d completions", judged.why, judged.failures, completions)
        for note in reply.notes if name not in self._noted else ():
            self._noted.add(name)
            log.warning("reward %r: %s. This is said once", name, note)


def task_of(config: RewardConfig) -> Task | None:
    """What its process does; None: it needs none."""
    for kind in PROCESSES:
        setting = getattr(config, kind)
        if setting is not None:
            return Task(kind, setting.model_dump())
    return None


def batch_of(completions: Sequence[Completion]) -> Batch:
    """The completions as a reward's process sees them; a row without a column that others have holds None there."""
    names = sorted({name for completion in completions for name in completion.columns})
    return Batch(
        prompts=[completion.prompt for completion in completions],
        completions=[completion.text for completion in completions],
        completion_ids=[completion.tokens.tolist() for completion in completions],
        columns={name: [completion.columns.get(name) for completion in completions] for name in names},
        rows=[completion.number for completion in completions],
    )


def within(completions: Sequence[Completion], bounds: LengthReward) -> list[float | None]:
    """1 where the number of sampled tokens, the stop token among them, is within the bounds, both included; else 0."""
    least = bounds.min_tokens or 0
    most = float("inf") if bounds.max_tokens is None else bounds.max_tokens
    return [float(least <= len(completion.tokens) <= most) for completion in completions]


def judge(config: RewardConfig, reply: Reply, completions: Sequence[Completion], unusable: bool = False) -> Judged:
    """Applies `on_error`. What can never score ends the job whatever it says."""
    rows = range(len(completions))
    bad = set(rows) if reply.failure is not None else set(reply.errors)
    replaced = 0.0 if config.on_error == "Zero" else np.nan
    given = reply.values if reply.failure is None else [None] * len(completions)
    values = [
        replaced if row in bad else np.nan if value is None else value for row, value in zip(rows, given, strict=True)
    ]
    why = _why(config, reply, completions)
    fatal = why if unusable else f"{why}. onError: Zero or Skip would let the job go on"
    ends = why is not None and (unusable or config.on_error == "Fail")
    return Judged(np.array(values, dtype=np.float64), len(bad), why, fatal if ends else None)


def _why(config: RewardConfig, reply: Reply, completions: Sequence[Completion]) -> str | None:
    name = f"reward {config.name!r}"
    if reply.failure is not None:
        return f"{name}: {reply.failure}"
    if reply.errors:
        place = min(reply.errors)
        return (
            f"{name}: {reply.errors[place]} (completion {place} of {len(completions)}, row {completions[place].number})"
        )
    return None
