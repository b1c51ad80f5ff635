"""Jobs that another one names in `fromJob`, as far as its plan needs to know them. Pure.

They are read from the cache; what a job was started with is also kept beside its configuration, because its parents may
be deleted while it runs, and it may have to be planned once more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Relative:
    """A job that another one names. `outcome`: Succeeded, Failed, or empty while it is not finished."""

    name: str
    uid: str
    stage: str
    outcome: str
    reason: str
    parents: tuple[str, ...]
    output: Mapping[str, Any] | None = None
    lineage: tuple[Mapping[str, Any], ...] = ()
    checkpoint: Mapping[str, Any] | None = None
    best: Mapping[str, Any] | None = None
    resolved: Mapping[str, Any] = field(default_factory=dict)


Family = Mapping[str, Relative]
"""By name; a name that is missing is a job that does not exist."""


def written(family: Family, names: Iterable[str]) -> str:
    """These jobs as JSON; empty where there are none."""
    found = {name: asdict(family[name]) for name in names}
    return json.dumps(found, sort_keys=True, separators=(",", ":")) if found else ""


def read(text: str) -> Family:
    """What `written` gave; nothing where it is of another release, or damaged."""
    try:
        return {name: _relative(fields) for name, fields in json.loads(text).items()} if text else {}
    except (ValueError, TypeError, AttributeError, KeyError):
        return {}


def _relative(fields: Mapping[str, Any]) -> Relative:
    return Relative(**{**fields, "parents": tuple(fields["parents"]), "lineage": tuple(fields["lineage"])})
