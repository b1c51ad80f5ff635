"""From prompts to scored samples: every rank generates and scores its share, then all have all of them.

Called by the collector and by the evaluation of stage RL. A sample's seed follows from the job's seed, the step, the
prompt's place in the order of training and the sample's number in its group: it does not matter where it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

Tokens = NDArray[np.int32]


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
        prompts = [self.prompts.prompt(int(row)) for row in order.rows]
        mine = range(self.runtime.rank, len(prompts) * order.group_size, self.runtime.ranks)
        with phases.measure("rollout"):
            requests = [self._request(order, prompts, number) for number in mine]
            samples = self.rollout.generate(requests, self.sampling, order.step, stopping)
        if samples is None:
            return None
        _check(samples, order.step)
        with phases.measure("reward"):
            scored = self.rewards.score(self._completions(order, prompts, dict(zip(mine, samples, strict=True))))
        return self._drawn(order, prompts, self.runtime.control.gather((list(mine), samples, scored)))

    def _request(self, order: Order, prompts: Sequence[Tokens], number: int) -> Request:
        prompt, member = divmod(number, order.group_size)
        seed = seed_of(self.seed, order.step, int(order.places[prompt]), member)
        return Request(prompts[prompt], seed)

    def _completions(self, order: Order, prompts: Sequence[Tokens], samples: Mapping[int, Sample]) -> list[Completion]:
        """Of samples by number. A prompt is read and decoded once for all of its samples."""
        owners = {number: number // order.group_size for number in samples}
        texts = {owner: self.decode(prompts[owner]) for owner in set(owners.values())}
        columns = {owner: self.prompts.columns(int(order.rows[owner])) for owner in texts}
        return [
            Completion(
                prompt=texts[owner],
                text=self.decode(samples[number].tokens),
                prompt_tokens=prompts[owner],
                tokens=samples[number].tokens,
                ended=samples[number].finish == "Stop",
                columns=columns[owner],
                number=int(order.rows[owner]),
            )
            for number, owner in owners.items()
        ]

    def _drawn(
        self, order: Order, prompts: Sequence[Tokens], parts: Sequence[tuple[list[int], list[Sample], Scored]]
    ) -> Drawn:
        samples = {i: sample for mine, part, _ in parts for i, sample in zip(mine, part, strict=True)}
        values = np.full((len(samples), len(self.rewards.names)), np.nan)
        for mine, _, scored in parts:
            values[mine] = scored.values
        ordered = [samples[number] for number in range(len(samples))]
        owners = np.repeat(np.arange(len(prompts)), order.group_size)
        experience = Experience(
            prompts=tuple(prompts[owner] for owner in owners.tolist()),
            completions=tuple(sample.tokens for sample in ordered),
            ended=np.array([sample.finish == "Stop" for sample in ordered]),
            group=owners,
            rewards=values,
            weights=self.rewards.weights,
            each={ROLLOUT: np.concatenate([sample.logprobs for sample in ordered])},
        )
        scores = [scored for *_, scored in parts]
        seconds = {name: max(scored.seconds.get(name, 0.0) for scored in scores) for name in self.rewards.names}
        failures = {name: sum(scored.failures.get(name, 0) for scored in scores) for name in self.rewards.names}
        return Drawn(experience, order.rows[owners], seconds, failures)


def _check(samples: list[Sample], step: int) -> None:
    for sample in samples:
        if sample.version != step:
            raise TrainerFailure(
                Reason.ROLLOUT_ERROR,
                f"The rollout engine answered with the weights of step {sample.version}, step {step} was asked for. "
                "Report it; set rollout.engine: Generate to go on.",
            )
