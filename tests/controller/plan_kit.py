"""Jobs, parents and plans for the plan's tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from posttrain_api.job import Job, parse_job
from posttrain_api.records import Checkpoint, Output
from posttrain_operator.plan.build import build_plan
from posttrain_operator.plan.parents import dependencies
from posttrain_operator.plan.types import Parent, Plan, PlanSettings
from tests.api.rule_cases import job as manifest

SETTINGS = PlanSettings(trainer_image="trainer:1")
UID = "3f0c"


def job(changes: Mapping[str, Any] | None = None) -> Job:
    """The smallest job with changes, as the API server would give it."""
    return parse_job(manifest({"metadata.uid": UID, **(changes or {})}))


def parent(name: str = "base", kind: Literal["safetensors", "peft"] = "safetensors", saved: bool = True) -> Parent:
    """A finished job."""
    folder = f"pvc://parent-claim/{name}/u0"
    checkpoint = Checkpoint(
        step=9, time="2026-01-01T00:00:00Z", uri=f"{folder}/checkpoints/step-9", size_bytes=1, digest="sha256:1"
    )
    output = Output(uri=f"{folder}/output", digest="sha256:2", format=kind, size_bytes=1)
    return Parent(name, "u0", "Pretrain", output, checkpoint if saved else None)


def plan(changes: Mapping[str, Any] | None = None, settings: PlanSettings = SETTINGS) -> Plan:
    """The plan of a job whose parents have all succeeded."""
    subject = job(changes)
    return build_plan(subject, settings, {name: parent(name) for name in dependencies(subject)})
