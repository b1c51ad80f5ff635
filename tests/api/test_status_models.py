"""The status schema takes what trainer and plan really send: every field of the wire records has its place."""

from __future__ import annotations

import pytest

from posttrain_api import records
from posttrain_api.base import Model
from posttrain_api.crd.document import crd
from posttrain_api.reasons import Reason
from posttrain_api.status import CONDITIONS, JobStatus
from posttrain_api.status.parts import BestStatus, CheckpointStatus, Condition, DataReport, Failure, OutputStatus
from posttrain_api.status.progress import Progress, ReportedResolution

NOW = "2026-01-31T12:00:00Z"


def wire_names(model: type[Model]) -> set[str]:
    return {info.alias or name for name, info in model.model_fields.items()}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (records.Checkpoint, CheckpointStatus),
        (records.Best, BestStatus),
        (records.DataReport, DataReport),
        (records.Output, OutputStatus),
        (records.Resolved, ReportedResolution),
    ],
)
def test_records_fit(sent: type[Model], status: type[Model]) -> None:
    assert wire_names(sent) == wire_names(status)


def test_report_fits_progress() -> None:
    """How long ago is said by the trainer, when it was by the status."""
    assert wire_names(records.Report) - {"idleSeconds"} <= wire_names(Progress)


def test_failure_fits() -> None:
    assert wire_names(records.Failure) - {"kind", "time"} <= wire_names(Failure)


def test_phases_are_the_same() -> None:
    ours = Progress.model_json_schema()["properties"]["phase"]["anyOf"][0]["enum"]
    assert ours == list(records.Phase.__args__)


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_fits_a_condition(reason: Reason) -> None:
    condition = Condition(type="Failed", status="True", reason=reason, message="", last_transition_time=NOW)
    assert JobStatus(reason=reason, conditions=(condition,)).to_wire()["conditions"][0]["reason"] == reason


def test_conditions() -> None:
    assert len(set(CONDITIONS)) == 8


def test_an_attempt_has_room_for_all_pods_and_their_replacements() -> None:
    """A restart records both before it deletes them; a list that is refused would end all writes of the status."""
    schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    nodes = schema["spec"]["properties"]["resources"]["properties"]["nodes"]["maximum"]
    recorded = schema["status"]["properties"]["attempt"]["properties"]["podUIDs"]["maxItems"]
    assert recorded >= 2 * nodes
