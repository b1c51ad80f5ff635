"""How a field of the API is declared: its words, unit, default, range and an example, said once.

`kubectl explain` shows the description built here, the CRD takes the bounds, and error messages take the example as
the next
step. Called by the spec models only; it knows no field of its own.

A field left out stays out of the stored object (None here): the effective value is the plan's business, so the
default is a text
for the reader and never a schema default.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from pydantic import AfterValidator, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from posttrain_api.base import Model

_UNBOUNDED: Final = 2**31
"""A bound that is only there because every field has one says nothing to a reader."""


class SpecModel(Model):
    """Base of the spec: strict about types too, because the API server is ("64" is no integer there)."""

    model_config = ConfigDict(strict=True)


def optional(text: str, *, example: Any, default: str | None = None, unit: str | None = None, **bounds: Any) -> Any:
    """A field that may be left out. `bounds` are pydantic's (ge, gt, le, lt, min_length, max_length, pattern,
    alias)."""
    return Field(None, **_arguments(text, example, default, unit, bounds))


def required(text: str, *, example: Any, unit: str | None = None, **bounds: Any) -> Any:
    """A field that must be given."""
    return Field(..., **_arguments(text, example, None, unit, bounds))


def _arguments(
    text: str, example: Any, default: str | None, unit: str | None, bounds: dict[str, Any]
) -> dict[str, Any]:
    return {
        "description": _describe(text, example, default, unit, bounds),
        "json_schema_extra": {"x-example": example},
        **bounds,
    }


def _describe(text: str, example: Any, default: str | None, unit: str | None, bounds: dict[str, Any]) -> str:
    parts = [text.rstrip(".") + "."]
    if unit:
        parts.append(f"Unit: {unit}.")
    if default:
        parts.append(f"Default: {default}.")
    if reach := describe_range(bounds):
        parts.append(f"Range: {reach}.")
    parts.append(f"Example: {_plain(example)}.")
    return " ".join(parts)


def describe_range(bounds: dict[str, Any]) -> str:
    """`1 to 512`, `more than 0, at most 1`; empty where there are no numeric bounds."""
    low, high = bounds.get("ge"), bounds.get("le")
    if low == 0 and high is not None and high >= _UNBOUNDED:
        return ""
    if low is not None and high is not None:
        return f"{_plain(low)} to {_plain(high)}"
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    return ", ".join(f"{word} {_plain(bounds[key])}" for key, word in words.items() if key in bounds)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$"
_QUANTITY = re.compile(QUANTITY_PATTERN.removesuffix("$"))


def _check_quantity(value: int | str) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and len(value) <= 32 and _QUANTITY.fullmatch(value):
        return value
    raise ValueError('must be a quantity: a whole number, or a text like "500m" or "64Gi"')


Quantity = Annotated[
    int | str,
    AfterValidator(_check_quantity),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 32,
            "minimum": 0,
            "pattern": QUANTITY_PATTERN,
            "x-kubernetes-int-or-string": True,
        }
    ),
]
"""A Kubernetes quantity as YAML gives it: 8, "500m", "64Gi"."""


class _NamedItems:
    """Marks a list whose items are told apart by their name: no two alike, and server-side apply merges them."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(_check_names, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), "x-kubernetes-list-map-keys": ["name"]}


NAMED = _NamedItems()


def _check_names(items: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [item.name for item in items]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"must not name {double} twice")
    return items


DNS_SUBDOMAIN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
JOB_NAME = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
MAX_JOB_NAME = 50
"""Children are called `<name>-worker-<i>` and names are label values of at most 63 characters."""

ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=DNS_SUBDOMAIN)]
