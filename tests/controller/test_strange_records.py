"""What a foreign or broken image leaves as its last word or reports must never keep a job from its end.

A termination message is written by whatever runs in the pod. What the status' schema would refuse, and what our own
code cannot read, counts as no record at all: then the exit code decides.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from model_cluster import Cluster, running_cluster

from posttrain_api.records import Report, parse_termination
from posttrain_operator import clock
from posttrain_operator.statusserver import progress
from posttrain_operator.statusserver.bodies import BodyError, Incoming, read_kubeflow, read_report

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FAILURE = {"kind": "failure", "reason": "StorageFull", "message": "m", "exitCode": 51}
CHECKPOINT = {"step": 1, "time": "2026-01-01T00:00:00Z", "uri": "pvc://c/x", "sizeBytes": 1, "digest": "d"}
SUCCESS = {
    "kind": "success",
    "step": 1,
    "output": {"uri": "pvc://c/x", "digest": "d", "format": "peft", "sizeBytes": 1},
    "checkpoint": CHECKPOINT,
}
BEFORE_ALL_TIME = "0001-01-01T00:00:00+14:00"


def ended(code: int, message: str) -> Cluster:
    cluster = running_cluster()
    cluster.end(cluster.uid("master"), code, message)
    cluster.settle()
    return cluster


def test_the_records_used_here_are_read() -> None:
    assert parse_termination(json.dumps(FAILURE)) is not None
    assert parse_termination(json.dumps(SUCCESS)) is not None


@pytest.mark.parametrize(
    "message",
    [
        "[" * 4096,
        '{"a":' * 800,
        json.dumps({**FAILURE, "rank": -1}),
        json.dumps({**FAILURE, "rank": 2**40}),
        json.dumps({**FAILURE, "step": -1}),
        json.dumps({**FAILURE, "step": 10**30}),
        json.dumps({**FAILURE, "signal": 1000}),
    ],
    ids=lambda message: message[-40:],
)
def test_a_failure_that_cannot_be_shown_leaves_the_exit_code(message: str) -> None:
    cluster = ended(51, message)
    assert cluster.status["reason"] == "StorageFull"
    assert not {"rank", "step", "signal"} & cluster.status["failure"].keys()


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": {**CHECKPOINT, "time": "yesterday"}},
        {"checkpoint": {**CHECKPOINT, "time": "2026-01-01T00:00:00"}},
        {"checkpoint": {**CHECKPOINT, "time": "2026-W05-3T00:00:00Z"}},
        {"checkpoint": {**CHECKPOINT, "time": "2026-02-31T00:00:00Z"}},
        {"checkpoint": {**CHECKPOINT, "step": 10**30}},
        {"best": {"step": 1, "metric": "x" * 65, "value": 1.0, "uri": "pvc://c/best"}},
        {"best": {"step": 1, "metric": "eval_loss", "value": "nan", "uri": "pvc://c/best"}},
        {"dataReport": {"rows": 1, "used": 1, "tokens": 1, "refusedByReason": {"x" * 65: 1}}},
        {"dataReport": {"rows": 1, "used": 1, "tokens": 1, "refusedByReason": {"x": -1}}},
    ],
    ids=lambda change: json.dumps(change)[-50:],
)
def test_a_success_that_cannot_be_shown_is_none(change: dict[str, Any]) -> None:
    assert parse_termination(json.dumps({**SUCCESS, **change})) is None


def test_a_time_outside_the_calendar_is_no_time() -> None:
    assert clock.parse(BEFORE_ALL_TIME) is None
    assert ended(51, json.dumps({**FAILURE, "time": BEFORE_ALL_TIME})).status["reason"] == "StorageFull"
    report = Incoming(Report(phase="Training", last_advance_time=BEFORE_ALL_TIME))
    assert "lastAdvanceTime" not in progress.advance({}, report, NOW)


def test_a_step_beyond_the_schema_is_refused_or_capped() -> None:
    with pytest.raises(BodyError, match="step"):
        read_report(json.dumps({"phase": "Training", "step": 10**30}).encode())
    metrics = [{"name": "current_step", "value": 1e300}, {"name": "total_steps", "value": 1e301}]
    report = read_kubeflow(json.dumps({"trainerStatus": {"metrics": metrics}}).encode()).report
    assert report.step == report.total_steps == 10**12
