"""The data of a step in stage RL: rollout, rewards, log-probabilities, advantages, and the updates made of them.

Called by the loop as the feed of the other stages is. Everything it knows of a step is the same on every rank, so that
groups and statistics do not depend on where a sample was drawn. It learns nothing and writes nothing but the samples
that are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain_trainer.advantages import ADVANTAGE
from posttrain_trainer.algorithms.base import OnlineAlgorithm
from posttrain_trainer.batching import micros_of
from posttrain_trainer.drawing import Drawn
from posttrain_trainer.experience import OLD, REFERENCE, VALUE, Experience
from posttrain_trainer.groups import Groups
from posttrain_trainer.metrics import Metrics, Phases
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.rollout.base import seed_of
from posttrain_trainer.rollout_metrics import metrics_of, sampling_difference
from posttrain_trainer.state import OnlineState
from posttrain_trainer.steps import Collected, Visit
from posttrain_trainer.token_scores import Score, TokenScores

Show = Callable[[int, Sequence[dict[str, Any]]], None]
"""Takes the samples of a step that are shown: (step, lines)."""
SHOWN = 16
"""Samples of each step in completions.jsonl."""


@dataclass(frozen=True)
class Models:
    """Who says something of each token: the policy, the reference and the critic where there are such."""

    policy: Score
    reference: Score | None = None
    value: Score | None = None


@dataclass(frozen=True)
class Pace:
    """batch_size: prompts of one update; next_kl: (coefficient, the rollout's metrics, samples) → the next step's
    coefficient."""

    batch_size: int
    seed: int
    first_kl: float
    next_kl: Callable[[float, Metrics, int], float]


@dataclass(frozen=True)
class Collector:
    """The source of steps in stage RL."""

    groups: Groups
    algorithm: OnlineAlgorithm
    models: Models
    scores: TokenScores
    pace: Pace
    show: Show | None = None

    def collect(self, visit: Visit) -> Collected | None:
        """As Source.collect. TrainerFailure(RolloutError, RewardError)."""
        online = visit.online or OnlineState(cursor=0, kl_coefficient=self.pace.first_kl)
        found = self.groups.draw(visit, online.cursor)
        experience = None if found is None else self._scored(found[0].experience, visit)
        if found is None or experience is None:
            return None
        drawn, cursor = found
        estimated = self.algorithm.estimate(experience, online.kl_coefficient)
        metrics = {
            **metrics_of(drawn, self.groups.drawer.rewards.names),
            **estimated.metrics,
            **sampling_difference(experience),
        }
        if self.show is not None:
            self.show(visit.step + 1, self._lines(drawn, estimated.each.get(ADVANTAGE)))
        coefficient = self.pace.next_kl(online.kl_coefficient, metrics, len(experience))
        return Collected(
            updates=self._updates(experience.having(**estimated.each), visit.step, visit.phases),
            metrics=metrics,
            tokens=int(experience.lengths().sum()),
            online=OnlineState(cursor=cursor, kl_coefficient=coefficient),
        )

    def epoch(self, steps: int, online: OnlineState | None) -> float:
        """Prompts drawn ÷ prompts of the set; dynamic sampling draws more than it trains on."""
        return 0.0 if online is None else online.cursor / self.groups.sampler.size

    def close(self) -> None:
        """Ends the rewards' processes."""
        self.groups.drawer.rewards.close()

    def _scored(self, experience: Experience, visit: Visit) -> Experience | None:
        """With what policy, reference and critic say of each token before the step's updates."""
        updates = self.algorithm.passes * -(-experience.groups // self.pace.batch_size)
        wanted = {
            OLD: self.models.policy if self.algorithm.needs_old or updates > 1 else None,
            REFERENCE: self.models.reference,
            VALUE: self.models.value,
        }
        for name, score in wanted.items():
            if score is None:
                continue
            with visit.phases.measure("reference" if name == REFERENCE else "scoring"):
                flat = self.scores.of(experience, score, visit.stopping)
            if flat is None:
                return None
            experience = experience.having(**{name: flat})
        return experience

    def _updates(self, experience: Experience, step: int, phases: Phases) -> Iterator[list[MicroBatch]]:
        """`passes` times over all groups, `batch_size` of them in each update, in an order of each pass's own."""
        groups, size = experience.groups, self.pace.batch_size
        for number in range(self.algorithm.passes):
            order = _shuffled(groups, seed_of(self.pace.seed, step, number)) if groups > size else np.arange(groups)
            for first in range(0, groups, size):
                with phases.measure("data"):
                    rows = np.flatnonzero(np.isin(experience.group, order[first : first + size]))
                    micros = micros_of(experience, rows, self.scores.part)
                yield micros

    def _lines(self, drawn: Drawn, advantage: NDArray[np.float32] | None) -> list[dict[str, Any]]:
        """The first samples, as they are shown."""
        drawer, experience = self.groups.drawer, drawn.experience
        advantages = None if advantage is None else [part[0] for part in experience.by_sample(advantage)]
        lines = []
        for number in range(min(SHOWN, len(experience))):
            rewards = dict(zip(drawer.rewards.names, map(_known, experience.rewards[number]), strict=True))
            lines.append(
                {
                    "prompt": drawer.decode(experience.prompts[number]),
                    "completion": drawer.decode(experience.completions[number]),
                    "reward": _known(experience.reward[number]),
                    "rewards": rewards,
                    "advantage": None if advantages is None else float(advantages[number]),
                    "ended": bool(experience.ended[number]),
                    "row": int(drawn.rows[number]),
                }
            )
        return lines


def _known(value: float) -> float | None:
    """None where a reward was skipped: JSON has no NaN."""
    return None if np.isnan(value) else float(value)


def _shuffled(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(count)
