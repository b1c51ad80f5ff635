"""How a local run ended: the launchers' last words turned into the status that the cluster would show.

Pure. The first failing pod in time is the cause, as on a cluster; an end by a signal of the caller is no failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from posttrain_api.reasons import REASONS, Effect, Reason, reason_of_exit_code
from posttrain_api.records import Failure, Success
from posttrain_operator.clock import render_duration
from posttrain_operator.plan.types import Plan
from posttrain_operator.status import learned

_COLLATERAL = (Reason.PEER_LOST, Reason.PREEMPTED)


@dataclass(frozen=True)
class PodEnd:
    """One launcher's end. `exit_code` is negative for a signal, as subprocess says it."""

    name: str
    exit_code: int
    last_word: Success | Failure | None
    log_tail: str


@dataclass(frozen=True)
class Span:
    """When the run began and ended, in UTC."""

    start: datetime
    end: datetime


def status_of(plan: Plan, ends: Sequence[PodEnd], span: Span, stopped: bool) -> dict[str, Any]:
    """status under the API's own names. `stopped`: the user ended the run (Suspended), it goes on when called again."""
    success = next((end.last_word for end in ends if isinstance(end.last_word, Success)), None)
    if success is not None and all(end.exit_code == 0 for end in ends):
        return {**_head(plan, span, "Succeeded", None, "the model is exported"), **_succeeded(success, plan)}
    if stopped:
        words = "stopped; the same command goes on from the last checkpoint"
        return _head(plan, span, "Suspended", Reason.USER_SUSPENDED, words)
    failure = _failure(first_failed(ends))
    reason = Reason(failure["reason"])
    state = "Suspended" if reason is Reason.GUARD_SUSPENDED else "Failed"
    return {**_head(plan, span, state, reason, failure["message"]), "failure": failure}


def first_failed(ends: Sequence[PodEnd]) -> PodEnd:
    """The cause: of the pods that failed, the first in time whose reason is not another pod's end."""
    failed = [end for end in ends if end.exit_code != 0] or list(ends)
    return min(failed, key=lambda end: (reason_of(end) in _COLLATERAL, _time(end)))


def reason_of(end: PodEnd) -> Reason:
    """What the pod itself says, else what its exit code means."""
    if isinstance(end.last_word, Failure):
        return end.last_word.reason
    return reason_of_exit_code(end.exit_code if end.exit_code >= 0 else 128 - end.exit_code)


def may_go_on(status: Mapping[str, Any]) -> bool:
    """Whether calling again would go on from a checkpoint: a cluster would have restarted it by itself, or waits."""
    reason = Reason(status["reason"]) if "reason" in status else None
    return reason is Reason.GUARD_SUSPENDED or (reason is not None and REASONS[reason].effect is Effect.RESTART)


def _time(end: PodEnd) -> str:
    return (end.last_word.time if isinstance(end.last_word, Failure) else None) or "9999"


def _head(plan: Plan, span: Span, state: str, reason: Reason | None, message: str) -> dict[str, Any]:
    topology = plan.config.topology
    head = {
        "state": state,
        "message": message,
        "startTime": _stamp(span.start),
        "completionTime": _stamp(span.end),
        "duration": render_duration((span.end - span.start).total_seconds()),
        "resources": {"gpus": topology.nodes * topology.gpus_per_node, "pods": topology.nodes},
        "resolved": dict(plan.resolved),
        "model": {"displayName": learned.display_name(plan)},
    }
    return head if reason is None else {"state": state, "reason": str(reason), **head}


def _succeeded(success: Success, plan: Plan) -> dict[str, Any]:
    facts = learned.succeeded({"resolved": plan.resolved}, success)
    metrics = [{"name": name, "value": repr(value)} for name, value in success.metrics.items()]
    progress = {"percent": 100, "display": "100 %", "step": success.step, "metrics": metrics}
    return {**{key: value for key, value in facts.items() if value}, "progress": progress}


def _failure(end: PodEnd) -> dict[str, Any]:
    if isinstance(end.last_word, Failure):
        return {
            **end.last_word.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"kind"}),
            "replica": end.name,
        }
    message = f"{end.name} ended with exit code {end.exit_code} and left no message; the end of its log is in logTail"
    return {
        "reason": str(reason_of(end)),
        "message": message,
        "replica": end.name,
        "exitCode": end.exit_code,
        "logTail": end.log_tail,
    }


def _stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
