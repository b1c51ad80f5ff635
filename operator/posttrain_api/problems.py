"""Problems: what is wrong with a job, each with its path, the rule, the value found and the next step.

Turns pydantic's errors into the API's own words. Used by `job` and by the plan; printed by `posttrain validate` and
shown in the
Validated condition.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from posttrain_api.base import Model
from posttrain_api.spec.fields import describe_range

_SHOWN = 80
_MISSING = object()


@dataclass(frozen=True)
class Problem:
    """One fault. `path` as in the YAML (`spec.data.train[0].uri`); `value` what stands there, None for nothing."""

    path: str
    rule: str
    value: Any
    next_step: str

    def __str__(self) -> str:
        """`spec.lora.rank: must be between 1 and 512 (found 0); choose e.g. 16`."""
        return f"{self.path}: {self.rule} ({_found(self.value)}); {self.next_step}"


class InvalidJob(ValueError):
    """A job that cannot be read; carries every problem."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


def _found(value: Any) -> str:
    if value is None:
        return "found nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return "found " + (text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")


def schema_problems(model: type[Model], root: str, error: ValidationError) -> list[Problem]:
    """Every error of the schema, at most one for each path (a union reports each of its members).

    A list that is said to be too short only because its items are wrong is not reported.
    """
    problems: dict[str, Problem] = {}
    details = error.errors(include_url=False)
    for detail in details:
        if detail["type"] == "too_short" and any(_inside(other["loc"], detail["loc"]) for other in details):
            continue
        problem = _translate(model, root, detail)
        problems.setdefault(problem.path, problem)
    return list(problems.values())


def _inside(loc: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(loc) > len(outer) and loc[: len(outer)] == outer


def _translate(model: type[Model], root: str, detail: ErrorDetails) -> Problem:
    steps, owner, info = _walk(model, detail["loc"])
    path = root + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    kind = detail["type"]
    value = None if kind == "missing" else detail["input"]
    if kind == "extra_forbidden":
        return Problem(path, "unknown field", value, _did_you_mean(str(steps[-1]), owner))
    return Problem(path, _rule(detail, info), value, _next_step(kind, info))


def _walk(
    model: type[Model], loc: tuple[int | str, ...]
) -> tuple[list[int | str], type[Model] | None, FieldInfo | None]:
    """Follows an error's location: the path without pydantic's own marks, the model that owns the last field, the
    field."""
    steps: list[int | str] = []
    owner: type[Model] | None = model
    inner: type[Model] | None = model
    info: FieldInfo | None = None
    for step in loc:
        if isinstance(step, int):
            steps.append(step)
            continue
        if inner is None:
            if info is None or not _is_map(info) or (len(steps) and steps[-1] == step):
                continue
            steps.append(step)
            continue
        owner, info = inner, _field_of(inner, step)
        steps.append(step)
        inner = model_in(info.annotation) if info else None
    return steps, owner, info


def _field_of(model: type[Model], wire: str) -> FieldInfo | None:
    return next((info for name, info in model.model_fields.items() if (info.alias or name) == wire), None)


def _is_map(info: FieldInfo) -> bool:
    return "dict[" in str(info.annotation)


def model_in(annotation: Any) -> type[Model] | None:
    """The model inside an optional, a list or an Annotated; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return annotation
    return next((found for part in get_args(annotation) if (found := model_in(part))), None)


def _did_you_mean(name: str, owner: type[Model] | None) -> str:
    return suggest(name, [info.alias or field for field, info in owner.model_fields.items()] if owner else [])


def suggest(name: str, known: Sequence[str]) -> str:
    """The next step for an unknown name: the one that was meant, else all that are known."""
    lower = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.6)
    if close:
        return f"did you mean {lower[close[0]]}?"
    return "remove it; known here: " + ", ".join(known)


def _rule(detail: ErrorDetails, info: FieldInfo | None) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("greater_than_equal", "greater_than", "less_than_equal", "less_than"):
        return _range_rule(info, context)
    words = _RULES.get(kind)
    return words(context) if words else str(detail["msg"]).removeprefix("Value error, ")


def _range_rule(info: FieldInfo | None, context: dict[str, Any]) -> str:
    bounds: dict[str, Any] = {}
    for item in info.metadata if info else ():
        bounds |= {key: getattr(item, key) for key in ("ge", "gt", "le", "lt") if hasattr(item, key)}
    if {"ge", "le"} <= bounds.keys():
        return f"must be between {bounds['ge']} and {bounds['le']}"
    return "must be " + describe_range(bounds or context)


_RULES: dict[str, Callable[[dict[str, Any]], str]] = {
    "missing": lambda _: "is required",
    "literal_error": lambda context: f"must be one of {str(context['expected']).replace(' or ', ', ')}".replace(
        "'", ""
    ),
    "string_pattern_mismatch": lambda context: f"must match {context['pattern']}",
    "string_too_short": lambda context: f"must have at least {context['min_length']} character(s)",
    "string_too_long": lambda context: f"must have at most {context['max_length']} characters",
    "too_short": lambda context: f"must have at least {context['min_length']} item(s)",
    "too_long": lambda context: f"must have at most {context['max_length']} items",
    "string_type": lambda _: "must be a text",
    "int_type": lambda _: "must be a whole number",
    "int_from_float": lambda _: "must be a whole number",
    "float_type": lambda _: "must be a number",
    "finite_number": lambda _: "must be a finite number",
    "bool_type": lambda _: "must be true or false",
    "model_type": lambda _: "must be a block of fields",
    "dict_type": lambda _: "must be a map",
    "tuple_type": lambda _: "must be a list",
}


def _next_step(kind: str, info: FieldInfo | None) -> str:
    extra = info.json_schema_extra if info else None
    example = extra.get("x-example") if isinstance(extra, dict) else None
    if example is None:
        return "see kubectl explain ptj.spec"
    text = example if isinstance(example, str) else json.dumps(example, ensure_ascii=False).replace('"', "")
    verb = "write" if kind in ("missing", "model_type", "tuple_type", "dict_type") else "choose"
    return f"{verb} e.g. {text}"
