"""Computes status.progress from a report and what status.progress was before. Pure: time is an argument.

Called by the writer for every write. The result always holds every field that is known, because with server-side
apply a field left out is a field deleted: facts that a restarted trainer does not repeat yet (checkpoint, data
report, resolved values) are carried over.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from posttrain_api.records import MAX_STACKS, Report
from posttrain_operator.statusserver.bodies import Incoming

FACTS = ("checkpoint", "best", "dataReport", "resolved")
"""What is written at once when it is new, and carried over when a report lacks it."""
_BEFORE_TRAINING = frozenset({"Preparing", "Waiting", "Loading"})
_MOST_IDLE = 10.0**8
_DISPLAY, _HEADLINE = 32, 64
"""Characters that the schema allows."""
_HEADLINES = (("reward", "reward"), ("loss", "loss"), ("train_loss", "loss"), ("eval_loss", "eval loss"))
"""The first metric that is there says how the training goes, under the word on the right."""
_THROUGHPUTS = ("tokens_per_second", "perf/tokens_per_second", "train_tokens_per_second")


def advance(previous: Mapping[str, Any] | None, incoming: Incoming, received: datetime) -> dict[str, Any]:
    """The new status.progress. `received`: when the report came in (UTC); it becomes lastUpdateTime."""
    before: Mapping[str, Any] = previous or {}
    report = incoming.report
    percent = percent_of(incoming)
    fields = {
        "percent": percent,
        "display": display(report, percent),
        "headline": headline(report.metrics),
        "phase": report.phase,
        "step": report.step,
        "totalSteps": report.total_steps,
        "epoch": report.epoch,
        "etaSeconds": eta_seconds(before, incoming, received),
        "slowestRank": report.slowest_rank,
        "metrics": [{"name": name, "value": repr(float(value))} for name, value in sorted(report.metrics.items())],
        "warning": None if report.warning is None else report.warning.to_wire(),
        "lastUpdateTime": rfc3339(received),
        "lastAdvanceTime": last_advance(before, incoming, received),
    }
    facts = {name: getattr(report, _attribute(name)) for name in FACTS}
    known = {name: before.get(name) if fact is None else fact.to_wire() for name, fact in facts.items()}
    if report.checkpoint is not None and report.best is None:
        known["best"] = None  # the two are sent together: the best checkpoint is lost
    return {name: value for name, value in {**fields, **known}.items() if value is not None}


def percent_of(incoming: Incoming) -> int | None:
    """Whole percent, rounded down, so that 100 means all steps are done. None: nobody knows the total."""
    report = incoming.report
    if report.total_steps is not None:
        return min(100, 100 * report.step // report.total_steps)
    return incoming.percent


def display(report: Report, percent: int | None) -> str:
    """What the Progress column shows: "42 % 120/285", "42 %", "step 120", or the phase before the first step."""
    if report.phase in _BEFORE_TRAINING and report.step == 0:
        return report.phase
    if report.total_steps is not None:
        return f"{percent} % {report.step}/{report.total_steps}"[:_DISPLAY]
    if percent is not None:
        return f"{percent} %"
    return f"step {report.step}"


def headline(metrics: Mapping[str, float]) -> str | None:
    """What the Metric column shows: "loss 1.234, 12.3k tok/s". None where neither is known."""
    parts = [f"{word} {metrics[name]:.4g}" for name, word in _HEADLINES if name in metrics][:1]
    speeds = [metrics[name] for name in _THROUGHPUTS if name in metrics]
    parts += [f"{_short(speed)} tok/s" for speed in speeds[:1]]
    return ", ".join(parts)[:_HEADLINE] or None


def eta_seconds(before: Mapping[str, Any], incoming: Incoming, received: datetime) -> int | None:
    """Seconds to the last step: the sender's figure, else by the pace since the last write, else that one's rest."""
    report = incoming.report
    if report.eta_seconds is not None:
        return report.eta_seconds
    if report.total_steps is None or report.phase in _BEFORE_TRAINING or report.phase == "Done":
        return None
    since = parse_time(before.get("lastUpdateTime"))
    seconds = (received - since).total_seconds() if since else 0.0
    done = report.step - int(before.get("step", 0))
    if before.get("phase") == "Training" and done > 0 and seconds > 0:
        return max(0, round((report.total_steps - report.step) * seconds / done))
    rest = before.get("etaSeconds")
    return None if rest is None or done < 0 else max(0, round(rest - seconds))


def last_advance(before: Mapping[str, Any], incoming: Incoming, received: datetime) -> str | None:
    """When the loop last moved; never goes back, never lies in the future (a clock ahead of ours would hide a hang).

    How long ago, where the sender says that: no clock of another machine is in it. A sender without either field
    (Kubeflow's protocol) has advanced when its step or its percentage went up.
    """
    known = parse_time(before.get("lastAdvanceTime"))
    claimed = parse_time(incoming.report.last_advance_time)
    if incoming.report.idle_seconds is not None:
        claimed = received - timedelta(seconds=min(incoming.report.idle_seconds, _MOST_IDLE))
    elif not incoming.own_clock and _moved(before, incoming):
        claimed = received
    times = [time for time in (known, claimed) if time is not None]
    return rfc3339(min(max(times), received)) if times else None


def is_urgent(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> bool:
    """Whether this must be seen at once: the first report, another phase, a new checkpoint or other fact."""
    if before is None:
        return True
    return any(before.get(name) != now.get(name) for name in ("phase", "warning", "stacks", *FACTS))


def idle_seconds(progress: Mapping[str, Any]) -> float:
    """How long the loop had stood still at the last report."""
    heard, advanced = (parse_time(progress.get(field)) for field in ("lastUpdateTime", "lastAdvanceTime"))
    return 0.0 if heard is None or advanced is None else (heard - advanced).total_seconds()


def with_stacks(body: Mapping[str, Any], *known: Mapping[int, str]) -> dict[str, Any]:
    """status.progress with the places of ranks, later ones over earlier ones; none: without any."""
    places = {rank: where for each in known for rank, where in each.items()}
    items = [{"rank": rank, "where": where} for rank, where in sorted(places.items())[:MAX_STACKS]]
    rest = {name: value for name, value in body.items() if name != "stacks"}
    return {**rest, "stacks": items} if items else rest


def stacks_of(progress: Mapping[str, Any] | None) -> dict[int, str]:
    """The places of ranks in status.progress."""
    return {int(each["rank"]): str(each["where"]) for each in (progress or {}).get("stacks") or ()}


def is_visible(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a person sees a difference: another percentage, or another step where there is no percentage."""
    field = "percent" if "percent" in now else "display"
    return bool(before.get(field) != now.get(field))


def rfc3339(time: datetime) -> str:
    """UTC with milliseconds: two writes of one job are told apart by it."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_time(text: Any) -> datetime | None:
    """A time with zone; None for anything else: a wrong clock must not cost the report."""
    if not isinstance(text, str):
        return None
    try:
        time = datetime.fromisoformat(text)
        return time.astimezone(UTC) if time.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None


def newer(left: Mapping[str, Any] | None, right: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The later of two versions of one progress (the cache may lag behind our own write, or be ahead of it)."""
    if left is None or right is None:
        return right if left is None else left
    oldest = datetime.min.replace(tzinfo=UTC)
    times = [parse_time(each.get("lastUpdateTime")) or oldest for each in (left, right)]
    return left if times[0] >= times[1] else right


def _moved(before: Mapping[str, Any], incoming: Incoming) -> bool:
    if not before:
        return True
    step = int(before.get("step", 0))
    percent = percent_of(incoming)
    return incoming.report.step > step or (percent is not None and percent > int(before.get("percent", -1)))


def _attribute(name: str) -> str:
    return "data_report" if name == "dataReport" else name


def _short(number: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{letter}"
    return f"{number:.0f}"
