"""From prompts to scored samples: every rank generates and scores its share, then all have all of them.

Called by the collector and by the evaluation of stage RL. A sample's seed follows from the job's seed, the step, the
prompt's place in the order of training and the sample's number in its group: it does not matter where it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.experience import ROLLOUT, Experience
from posttrain_trainer.metrics import Phases
from posttrain_trainer.rewards.base import Completion, Rewards, Scored
from posttrain_trainer.rollout.base import Request, Rollout, Sample, Sampling, Stopping, seed_of
from posttrain_trainer.runtime import Runtime


class Prompts(Protocol):
    """A prompt set."""

    def __len__(self) -> int: ...

    def prompt(self, row: int) -> NDArray[np.int32]:
        """Token ids."""
        ...

    def columns(self, row: int) -> Mapping[str, Any]:
        """Every other column of the row."""
        ...


@dataclass(frozen=True)
class Order:
    """What is drawn: `group_size` samples for each of `rows` [p] of the prompt set, which stand at `places` [p] in the
    order of training. step: of the weights, and part of the seeds."""

    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    group_size: int
    step: int


@dataclass(frozen=True)
class Drawn:
    """rows [n]: each sample's row in the prompt set; seconds (of the slowest rank) and failures (of all) by reward."""

    experience: Experience
    rows: NDArray[np.int64]
    seconds: Mapping[str, float]
    failures: Mapping[str, int]


@dataclass(frozen=True)
class Drawer:
    """What samples are made of. decode: token ids → text without special tokens."""

    prompts: Prompts
    rollout: Rollout
    rewards: Rewards
    sampling: Sampling
    decode: Callable[[NDArray[np.int32]], str]
    seed: int
    runtime: Runtime

    def draw(self, order: Order, stopping: Stopping, phases: Phases) -> Drawn | None:
        """The samples of all ranks, group after group; None where the ranks agreed to stop. TrainerFailure(RolloutError
        or RewardError)."""
        rows = np.repeat(order.rows, order.group_size)
        mine = range(self.runtime.rank, len(rows), self.runtime.ranks)
        with phases.measure("rollout"):
            samples = self.rollout.generate(
                [self._request(order, i) for i in mine], self.sampling, order.step, stopping
            )
        if samples is None:
            return None
        _check(samples, order.step)
        with phases.measure("reward"):
            scored = self.rewards.score(
                [self._completion(int(rows[i]), sample) for i, sample in zip(mine, samples, strict=True)]
            )
        parts = self.runtime.control.gather((list(mine), samples, scored))
        return self._drawn(parts, rows, order.group_size)

    def _request(self, order: Order, number: int) -> Request:
        prompt, member = divmod(number, order.group_size)
        seed = seed_of(self.seed, order.step, int(order.places[prompt]), member)
        return Request(self.prompts.prompt(int(order.rows[prompt])), seed)

    def _completion(self, row: int, sample: Sample) -> Completion:
        prompt = self.prompts.prompt(row)
        return Completion(
            prompt=self.decode(prompt),
            text=self.decode(sample.tokens),
            prompt_tokens=prompt,
            tokens=sample.tokens,
            ended=sample.finish == "Stop",
            columns=self.prompts.columns(row),
            number=row,
        )

    def _drawn(self, parts: list[tuple[list[int], list[Sample], Scored]], rows: NDArray[np.int64], size: int) -> Drawn:
        samples = {i: sample for mine, part, _ in parts for i, sample in zip(mine, part, strict=True)}
        values = np.full((len(rows), len(self.rewards.names)), np.nan)
        for mine, _, scored in parts:
            values[mine] = scored.values
        ordered = [samples[i] for i in range(len(rows))]
        experience = Experience(
            prompts=tuple(self.prompts.prompt(int(row)) for row in rows),
            completions=tuple(sample.tokens for sample in ordered),
            ended=np.array([sample.finish == "Stop" for sample in ordered]),
            group=np.arange(len(rows)) // size,
            rewards=values,
            weights=self.rewards.weights,
            each={ROLLOUT: np.concatenate([sample.logprobs for sample in ordered])},
        )
        scores = [scored for *_, scored in parts]
        seconds = {name: max(scored.seconds.get(name, 0.0) for scored in scores) for name in self.rewards.names}
        failures = {name: sum(scored.failures.get(name, 0) for scored in scores) for name in self.rewards.names}
        return Drawn(experience, rows, seconds, failures)


def _check(samples: list[Sample], step: int) -> None:
    for sample in samples:
        if sample.version != step:
            raise TrainerFailure(
                Reason.ROLLOUT_ERROR,
                f"The rollout engine answered with the weights of step {sample.version}, step {step} was asked for. "
                "Report it; set rollout.engine: Generate to go on.",
            )
