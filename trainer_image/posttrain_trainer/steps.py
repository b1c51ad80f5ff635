"""What the loop asks for at each step and what it gets: the updates of the step, as micro-batches.

Between the loop and whatever makes a step's data: the feed (rows of a token set: one update) and the collector
(a rollout: several). Neither knows the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from posttrain_trainer.metrics import Phases
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.state import OnlineState


@dataclass(frozen=True)
class Visit:
    """A step that is about to be done. online: what stage RL carries from step to step; stopping: whether the ranks
    agreed to stop, asked by all of them together."""

    step: int
    online: OnlineState | None
    phases: Phases
    stopping: Callable[[], bool]


@dataclass(frozen=True)
class Collected:
    """updates: the micro-batches of each optimizer update on this rank, made as they are asked for; all ranks have
    equally many of both. metrics: of the collecting. tokens: of the step over all ranks, None where those of its
    updates count. online: what holds after the step."""

    updates: Iterable[list[MicroBatch]]
    metrics: Mapping[str, float] = field(default_factory=dict)
    tokens: int | None = None
    online: OnlineState | None = None


class Source(Protocol):
    """Makes the data of steps."""

    def collect(self, visit: Visit) -> Collected | None:
        """The data of a step; None where the ranks agreed to stop meanwhile. All ranks call it together."""

    def epoch(self, steps: int, online: OnlineState | None) -> float:
        """Epochs done after `steps` steps."""
        ...

    def close(self) -> None:
        """Ends whatever runs beside the rank."""
