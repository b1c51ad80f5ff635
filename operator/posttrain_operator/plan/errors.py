"""What keeps a readable job from becoming a plan."""

from __future__ import annotations

from posttrain_api.problems import Problem
from posttrain_api.reasons import Reason


class PlanError(ValueError):
    """No plan follows from this job. `reason` is InvalidSpec, Unsupported, or WaitingForDependency where a parent is
    not there."""

    def __init__(self, reason: Reason, problems: tuple[Problem, ...]) -> None:
        self.reason = reason
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


def refuse(path: str, rule: str, value: object, next_step: str, reason: Reason = Reason.INVALID_SPEC) -> PlanError:
    """A PlanError of one problem."""
    return PlanError(reason, (Problem(path, rule, value, next_step),))
