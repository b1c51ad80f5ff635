"""What a training carries from step to step beside weights, optimizers and random numbers: part of each checkpoint.

Changed by the loop alone, written and read by checkpoint.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from posttrain_api.records import Best
from posttrain_trainer.guards import GuardState
from posttrain_trainer.metrics import finite


@dataclass(frozen=True)
class OnlineState:
    """What stage RL carries from step to step. `cursor`: prompts that were taken so far, those of refills too;
    `kl_coefficient`: PPO's, which adapts."""

    cursor: int
    kl_coefficient: float


@dataclass(frozen=True)
class State:
    """What the loop counts. `metrics`: the last step's, for the success record of a job that only has to export;
    `best`: the best evaluation so far, whose checkpoint is kept; `online`: of stage RL; `guards`: of the rules of the
    job, counted on rank 0."""

    step: int = 0
    tokens: int = 0
    metrics: dict[str, float] | None = None
    best: Best | None = None
    online: OnlineState | None = None
    guards: GuardState = field(default_factory=GuardState)

    @property
    def spared(self) -> frozenset[int]:
        """Steps whose checkpoints stay, however old."""
        kept = (self.best.step if self.best is not None else None, self.guards.good)
        return frozenset(step for step in kept if step is not None)

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON. A metric that is no number is left out: an evaluation that gave one is repeated on resume."""
        metrics = None if self.metrics is None else finite(self.metrics)
        best = None if self.best is None else self.best.to_wire()
        online = None if self.online is None else vars(self.online)
        counted = {"step": self.step, "tokens": self.tokens, "metrics": metrics}
        return {**counted, "best": best, "online": online, "guards": self.guards.to_wire()}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> State:
        """What `to_wire` gave, of a release without `best`, `online` or `guards` too."""
        best, online = wire.get("best"), wire.get("online")
        objects = {
            "best": None if best is None else Best.model_validate(best),
            "online": None if online is None else OnlineState(**online),
            "guards": GuardState.from_wire(wire.get("guards")),
        }
        return cls(**{**wire, **objects})

    def elsewhere(self) -> State:
        """As another job begins with it: what was measured and judged was that job's."""
        return replace(self, metrics=None, best=None, guards=GuardState())
