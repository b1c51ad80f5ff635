"""Reads the two bodies that a trainer may send: our own Report, and Kubeflow's trainerStatus.

Called by the handlers, pure. Our own body is refused where it is wrong, because our trainer and this server are of
one version. Kubeflow's is sent by images we do not know: unknown keys are dropped, and so is a metric that is no
finite number (a loss that became NaN must not cost the report). NaN never goes further than this module: the API
server answers 500 to it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from posttrain_api.records import MAX_METRICS, Report

METRIC_NAME = re.compile(r"[A-Za-z0-9_./:@\- ]{1,64}")
_SHOWN = 80
"""How much of a wrong value an error message repeats."""

_STEP, _TOTAL, _EPOCH = "current_step", "total_steps", "current_epoch"
"""Names under which transformers' callback hides its position among the metrics."""
_MOST_STEPS = 10**12


class BodyError(ValueError):
    """A body that is refused. The message names field, rule, value and next step."""


@dataclass(frozen=True)
class Incoming:
    """One accepted report. `percent`: where the sender knows no steps; `own_clock`: the loop set last_advance_time."""

    report: Report
    percent: int | None = None
    own_clock: bool = True
    dropped: tuple[str, ...] = ()
    """Names of metrics that were left out."""


def read_report(raw: bytes) -> Incoming:
    """Our own body: the wire form of posttrain_api.records.Report. BodyError where it breaks a rule."""
    value = _json_object(raw)
    metrics = value.get("metrics", {})
    if not isinstance(metrics, dict):
        raise _error("metrics", "must be an object of numbers", metrics)
    for name in metrics:
        if not METRIC_NAME.fullmatch(name):
            raise _error("metrics", "a name has 1 to 64 letters, digits, blanks or _./:@-", name)
    finite = {name: number for name, number in metrics.items() if not _non_finite(number)}
    try:
        report = Report.model_validate({**value, "metrics": finite})
    except ValidationError as error:
        raise BodyError("; ".join(_explain(item) for item in error.errors()[:5])) from None
    return Incoming(report=report, dropped=tuple(sorted(metrics.keys() - finite.keys())))


def read_kubeflow(raw: bytes) -> Incoming:
    """Kubeflow's `{"trainerStatus": {progressPercentage, estimatedRemainingSeconds, metrics, lastUpdatedTime}}`."""
    status = _json_object(raw).get("trainerStatus")
    if not isinstance(status, dict):
        raise _error("trainerStatus", "must be an object", status)
    percent = _whole(status, "progressPercentage", 100)
    eta = _whole(status, "estimatedRemainingSeconds", 10**9)
    entries = status.get("metrics") or []
    if not isinstance(entries, list):
        raise _error("trainerStatus.metrics", "must be a list of {name, value}", entries)
    numbers, dropped = _numbers(entries)
    step, total, epoch = (numbers.pop(name, None) for name in (_STEP, _TOTAL, _EPOCH))
    report = Report(
        phase="Done" if percent == 100 else "Training",
        step=min(_MOST_STEPS, max(0, int(step or 0))),
        total_steps=min(_MOST_STEPS, int(total)) if total and total >= 1 else None,
        epoch=epoch if epoch is not None and epoch >= 0 else None,
        eta_seconds=eta,
        metrics=dict(list(numbers.items())[:MAX_METRICS]),
    )
    dropped = (*dropped, *list(numbers)[MAX_METRICS:])
    return Incoming(report=report, percent=percent, own_clock=False, dropped=dropped)


def printable(text: str) -> str:
    """A text of another's for our log: nothing in it but lines and tabs moves a terminal."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "�" for sign in text)


def _numbers(entries: Iterable[Any]) -> tuple[dict[str, float], tuple[str, ...]]:
    """The finite metrics by name (the last of a name holds), and the names left out."""
    kept: dict[str, float] = {}
    dropped: list[str] = []
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise _error("trainerStatus.metrics", "each item is an object with name and value", entry)
        number = _number(entry.get("value"))
        if number is None or not METRIC_NAME.fullmatch(entry["name"]):
            dropped.append(entry["name"][:64])
        else:
            kept[entry["name"]] = number
    return kept, tuple(dropped)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _non_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _whole(status: Mapping[str, Any], field: str, most: int) -> int | None:
    value = status.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise _error(f"trainerStatus.{field}", f"must be a whole number from 0 to {most}", value)
    return value


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BodyError(f"body: must be JSON in UTF-8 ({error}); send Content-Type application/json") from None
    if not isinstance(value, dict):
        raise _error("body", "must be a JSON object", value)
    return value


def _error(field: str, rule: str, value: Any) -> BodyError:
    return BodyError(f"{field}: {rule}; found {_shown(value)}. See docs/platform/status-server.md")


def _explain(item: Mapping[str, Any]) -> str:
    path = ".".join(str(part) for part in item["loc"]) or "body"
    return str(_error(path, item["msg"], item["input"]))


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
