"""Rules over time: what may still change once a job has started, and what a status may never take back.

Only the API server knows the old object, so these have no Python half. They bind the operator's own writes too.
"""

from __future__ import annotations

from itertools import accumulate

from posttrain_api.rules.types import Rule
from posttrain_api.spec import JobSpec

EDITABLE = ("suspend", "runPolicy")
"""Top-level fields of the spec that may change while the job runs."""

_STARTED = "has(oldSelf.status) && has(oldSelf.status.backend)"


def _frozen_fields() -> tuple[str, ...]:
    names = (field.alias or name for name, field in JobSpec.model_fields.items())
    return tuple(name for name in names if name not in EDITABLE)


def _same(path: str) -> str:
    """CEL: the field at the path is what it was, its absence too (optional types lose the bounds, and so the cost)."""
    below_spec = list(accumulate(path.split("."), "{}.{}".format))[1:]
    there, was = (" && ".join(f"has({side}.{step})" for step in below_spec) for side in ("self", "oldSelf"))
    return f"(({there}) == ({was}) && (!({there}) || self.{path} == oldSelf.{path}))"


_GRACE = "spec.runPolicy.terminationGracePeriodSeconds"


def _changed_names() -> str:
    """CEL text: the changed fields, each after a blank. No list is made: the cost estimate would not know its size."""
    paths = [f"spec.{name}" for name in _frozen_fields()] + [_GRACE]
    return " + ".join(f"({_same(path)} ? '' : ' {path}')" for path in paths)


_ADVICE = (
    "only suspend and runPolicy can be edited now (without terminationGracePeriodSeconds); "
    "make a job of another name for another run"
)

TRANSITION_RULES: tuple[Rule, ...] = (
    Rule(
        at=("",),
        cel=f"!({_STARTED}) || ("
        + " && ".join(_same(path) for path in (*[f"spec.{n}" for n in _frozen_fields()], _GRACE))
        + ")",
        must="the job has started and its spec is immutable",
        instead=_ADVICE,
        message_expression=f"'the job has started, immutable now:' + {_changed_names()} + '; {_ADVICE}'",
        field=".spec",
        forbidden=True,
    ),
    Rule(
        at=("",),
        cel="!has(oldSelf.status) || has(self.status)",
        must="status must not be removed",
        instead="send the whole status",
        field=".status",
    ),
)

_TERMINAL = "['Complete', 'Failed', 'Finished']"

STATUS_RULES: tuple[Rule, ...] = (
    Rule(
        at=("status",),
        cel="!has(oldSelf.conditions) || oldSelf.conditions"
        f".filter(old, old.type in {_TERMINAL} && old.status == 'True')"
        ".all(old, has(self.conditions) && self.conditions.exists(new, new.type == old.type && "
        "new.status == 'True' && new.reason == old.reason))",
        must="a terminal condition never goes back",
        instead="make a new job for another run",
        field=".conditions",
        forbidden=True,
    ),
    Rule(
        at=("status",),
        cel="!has(self.conditions) || !(self.conditions.exists(c, c.type == 'Complete' && c.status == 'True') && "
        "self.conditions.exists(c, c.type == 'Failed' && c.status == 'True'))",
        must="Complete and Failed exclude each other",
        instead="set one of them",
        field=".conditions",
    ),
    Rule(
        at=("status",),
        cel="!has(oldSelf.observedGeneration) || (has(self.observedGeneration) && "
        "self.observedGeneration >= oldSelf.observedGeneration)",
        must="observedGeneration never decreases",
        instead="the writer has read an old object: read it again",
        field=".observedGeneration",
    ),
)
