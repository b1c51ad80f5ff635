"""`checkpoint.from.fromJob`: what another job has left is gone on with, also where that job has failed; and what is
told when a job has fallen back to an older checkpoint of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from model_cluster import Cluster, running_cluster
from plan_kit import job, plan

from posttrain_operator import clock
from posttrain_operator.plan.parents import continued, dependencies
from posttrain_operator.reconcile.relatives import Relative

FROM = {"checkpoint": {"from": {"fromJob": {"name": "base"}}}}
CHECKPOINT = {
    "step": 9,
    "time": "2026-01-01T00:00:00Z",
    "uri": "pvc://elsewhere/base/u0/checkpoints/step-000009",
    "sizeBytes": 1,
    "digest": "sha256:1",
}


def _base(outcome: str, checkpoint: dict[str, Any] | None = CHECKPOINT) -> Relative:
    return Relative("base", "u0", "Pretrain", outcome, "DeadlineExceeded", (), checkpoint=checkpoint)


def _settled(**family: Relative) -> Cluster:
    cluster = Cluster(**FROM)
    cluster.family = family
    cluster.settle()
    return cluster


def test_of_a_job_that_is_continued_nothing_but_its_checkpoint_is_taken() -> None:
    start = {"spec.checkpoint": FROM["checkpoint"]}
    assert continued(job(start)) == {"base"}
    assert continued(job({**start, "spec.model": {"fromJob": {"name": "base"}}})) == frozenset()
    other = job({**start, "spec.model": {"fromJob": {"name": "other"}}})
    assert (continued(other), dependencies(other)) == ({"base"}, ("other", "base"))


def test_the_folder_of_all_is_mounted_read_only_so_that_an_older_one_serves() -> None:
    made = plan({"spec.checkpoint": FROM["checkpoint"]})
    assert made.config.checkpoint.start_from is not None
    assert made.config.checkpoint.start_from.path == "/claims/parent-claim/base/u0/checkpoints"
    assert "parent-claim" in made.claims


def test_a_job_that_failed_is_gone_on_with() -> None:
    cluster = _settled(base=_base("Failed"))
    assert cluster.child is not None
    assert [entry["job"] for entry in cluster.status["lineage"]] == ["base"]
    assert cluster.status["resolved"]["checkpoint"]["from"] == "pvc://elsewhere/base/u0/checkpoints"


def test_a_job_that_failed_before_its_first_checkpoint_is_not() -> None:
    cluster = _settled(base=_base("Failed", None))
    assert (cluster.status["state"], cluster.status["reason"]) == ("Failed", "DependencyFailed")
    assert "before its first checkpoint" in cluster.status["message"]


def test_a_job_that_runs_is_waited_for() -> None:
    cluster = _settled(base=_base(""))
    assert cluster.status["reason"] == "WaitingForDependency"
    assert "base to finish" in cluster.status["message"]
    cluster.family = {"base": _base("Failed")}
    cluster.settle()
    assert cluster.child is not None


def test_a_model_is_taken_of_a_job_that_succeeded_only() -> None:
    cluster = Cluster(**FROM, model={"fromJob": {"name": "base"}})
    cluster.family = {"base": _base("Failed")}
    cluster.settle()
    assert (cluster.status["state"], cluster.status["reason"]) == ("Failed", "DependencyFailed")


def test_a_status_without_an_output_is_enough() -> None:
    """A job that has succeeded and says no output, of which only the checkpoint is wanted."""
    cluster = _settled(base=replace(_base("Succeeded"), output=None))
    assert cluster.child is not None


def _resume(cluster: Cluster, step: int, refused: str | None) -> list[tuple[str, str]]:
    told = {} if refused is None else {"refused": refused}
    known = {"step": step, "time": clock.render(cluster.now), "digest": str(step), **told}
    cluster.report(phase="Training", checkpoint=known)
    return [(event.kind, event.reason) for event in cluster.step().events]


def test_a_fall_to_an_older_checkpoint_is_told_once() -> None:
    cluster = running_cluster()
    why = "/storage/job/u/checkpoints/step-000006/trainer.json: missing, the manifest says 412 bytes"
    assert _resume(cluster, 6, None) == []
    assert _resume(cluster, 4, why) == [("Warning", "CheckpointRefused")]
    assert cluster.status["checkpoints"]["last"]["refused"] == why
    assert _resume(cluster, 4, why) == []
    assert _resume(cluster, 8, None) == []
    assert "refused" not in cluster.status["checkpoints"]["last"]


def test_another_write_does_not_tell_it_again() -> None:
    cluster = running_cluster()
    assert _resume(cluster, 4, "a file is missing") == [("Warning", "CheckpointRefused")]
    cluster.edit(suspend=True)
    passes = [cluster.step() for _ in range(3)]
    assert any(actions.status is not None for actions in passes)
    assert "CheckpointRefused" not in [event.reason for actions in passes for event in actions.events]
