"""reconcile until a job runs, case by case: start, stalls, dependencies, the loop's beginning."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from model_cluster import Cluster, running_cluster
from reconcile_kit import OUTPUT, everybody, ready_cluster
from trainjob_model import TrainJobCluster

from posttrain_api.reasons import Reason
from posttrain_operator.facts import Missing, Note
from posttrain_operator.reconcile.relatives import Relative, read, written


def test_configuration_before_child_and_status_after() -> None:
    cluster = Cluster()
    cluster.bundle = "PEM"
    first = cluster.step()
    assert [create.name for create in first.create] == ["job-config", "job-status-ca", "job"]
    assert first.status is None
    assert first.requeue_after == 0
    second = cluster.step()
    assert second.status is not None
    assert second.status["backend"]["uid"] == cluster.child["metadata"]["uid"]
    assert cluster.step().nothing


def test_a_refused_spec_names_every_problem() -> None:
    cluster = Cluster(lora={"rank": 0}, training={"epochs": -1})
    cluster.settle()
    assert (cluster.status["state"], cluster.status["reason"]) == ("Failed", "InvalidSpec")
    assert "spec.lora.rank" in cluster.status["message"]
    assert "spec.training.epochs" in cluster.status["message"]
    assert cluster.condition("Validated")["status"] == "False"
    assert cluster.child is None


def test_an_edit_before_the_start_is_taken() -> None:
    """The child was made from an older spec and the status does not know it yet."""
    cluster = Cluster()
    cluster.step()
    assert cluster.child is not None
    before = cluster.child["metadata"]["uid"]
    cluster.edit(training={"learningRate": 0.1})
    cluster.settle()
    assert cluster.child["metadata"]["uid"] != before
    assert "0.1" in cluster.maps["job-config"]["data"]["config.json"]


def test_the_message_says_what_a_pod_waits_for() -> None:
    """Also where it is nothing that we know: nobody should have to look for it in the pods."""
    cluster = Cluster()
    cluster.settle()
    cluster.training_operator()
    told = {"reason": "CreateContainerError", "message": "no such device"}
    status = {"phase": "Pending", "containerStatuses": [{"name": "pytorch", "state": {"waiting": told}}]}
    cluster.pods[cluster.uid("master")]["status"] = status
    cluster.settle()
    assert cluster.status["message"].endswith("; pod job-master-0 waits: CreateContainerError: no such device")


@pytest.mark.parametrize("writes", range(6))
@pytest.mark.parametrize("kind", [Cluster, TrainJobCluster])
def test_an_edit_that_is_taken_back_leaves_no_child_without_what_it_needs(kind: type[Cluster], writes: int) -> None:
    """The process dies behind each write of making the child anew."""
    cluster = kind()
    cluster.step()
    cluster.edit(training={"learningRate": 0.1})
    while writes > 0:
        actions = cluster.step(prefix=writes)
        writes -= max(1, len(actions.create) + len(actions.patch) + len(actions.delete))
    cluster.edit(training={})
    cluster.settle()
    assert cluster.child is not None
    its, config = (each["metadata"]["annotations"] for each in (cluster.child, cluster.maps["job-config"]))
    assert its == config
    runtime = cluster.child["spec"].get("runtimeRef")
    assert runtime is None or runtime["name"] in cluster.maps


def test_a_configuration_of_another_spec_is_made_anew() -> None:
    cluster = Cluster()
    cluster.step(prefix=1)
    assert cluster.child is None
    cluster.edit(training={"learningRate": 0.1})
    cluster.settle()
    assert "0.1" in cluster.maps["job-config"]["data"]["config.json"]


@pytest.mark.parametrize("reason", [Reason.STORAGE_NOT_FOUND, Reason.CONFIG_MAP_NOT_FOUND])
def test_missing_objects_stall_and_are_tried_again(reason: Reason) -> None:
    cluster = Cluster()
    cluster.missing = (Missing(reason, "it is not there"),)
    actions = cluster.step()
    assert actions.requeue_after == cluster.timing.retry
    assert (cluster.condition("Stalled")["status"], cluster.condition("Stalled")["reason"]) == ("True", reason)
    cluster.missing = ()
    cluster.settle()
    assert cluster.child is not None
    assert cluster.condition("Stalled")["status"] == "False"


def test_backend_missing() -> None:
    cluster = Cluster()
    cluster.backend_available = False
    cluster.settle()
    assert cluster.status["reason"] == "BackendMissing"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ('pods "x" is forbidden: exceeded quota: gpus', Reason.QUOTA_EXCEEDED),
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest"', Reason.POD_SECURITY_DENIED),
    ],
)
def test_pods_that_cannot_be_made(message: str, reason: Reason) -> None:
    cluster = Cluster()
    cluster.settle()
    assert cluster.child is not None
    cluster.notes = (Note(cluster.child["metadata"]["uid"], "FailedCreatePod", message, "2026-01-01T00:00:05Z"),)
    cluster.pass_time(5)
    cluster.settle()
    assert cluster.condition("Stalled")["reason"] == reason
    cluster.training_operator()
    cluster.settle()
    assert cluster.condition("Stalled")["status"] == "False"


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (
            {"containerStatuses": [{"name": "pytorch", "state": {"waiting": {"reason": "ImagePullBackOff"}}}]},
            "ImagePullFailed",
        ),
        (
            {
                "containerStatuses": [
                    {
                        "name": "pytorch",
                        "state": {
                            "waiting": {"reason": "CreateContainerConfigError", "message": 'secret "s" not found'}
                        },
                    }
                ]
            },
            "SecretNotFound",
        ),
        (
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
                ]
            },
            "Unschedulable",
        ),
        (
            {
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "reason": "Unschedulable",
                        "message": 'persistentvolumeclaim "d" not found',
                    }
                ]
            },
            "StorageNotFound",
        ),
    ],
)
def test_pods_that_do_not_start(status: dict[str, Any], reason: str) -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.training_operator()
    uid = cluster.uid("worker")
    cluster.pods[uid]["status"] = {"phase": "Pending", **status}
    cluster.pass_time(60)
    cluster.settle()
    assert cluster.condition("Stalled")["reason"] == reason
    cluster.pods[uid]["status"] = {"phase": "Pending"}
    cluster.run_all()
    cluster.settle()
    assert cluster.status["state"] == "Running"


def test_a_secret_that_cannot_be_mounted_shows_in_events() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.training_operator()
    message = 'MountVolume.SetUp failed for volume "secret-0" : secret "hf" not found'
    cluster.notes = (Note(cluster.uid("master"), "FailedMount", message),)
    cluster.settle()
    assert cluster.status["reason"] == "SecretNotFound"


def test_a_secret_that_came_is_missed_no_more_while_its_image_is_pulled() -> None:
    """Kubernetes keeps the Event for an hour; the pod itself says that its volumes are there."""
    cluster = Cluster()
    cluster.settle()
    cluster.training_operator()
    uid = cluster.uid("master")
    cluster.notes = (Note(uid, "FailedMount", 'secret "hf" not found'),)
    mounted = {"type": "PodReadyToStartContainers", "status": "True"}
    pulling = {"name": "pytorch", "state": {"waiting": {"reason": "ContainerCreating"}}}
    cluster.pods[uid]["status"] = {"phase": "Pending", "conditions": [mounted], "containerStatuses": [pulling]}
    cluster.settle()
    assert cluster.condition("Stalled")["status"] == "False"


def test_a_lost_configuration_is_made_again_with_the_child() -> None:
    cluster = running_cluster()
    del cluster.maps["job-config"]
    cluster.forget()
    for uid in list(cluster.pods):
        cluster.vanish(uid)
    cluster.training_operator()
    message = 'MountVolume.SetUp failed for volume "config" : configmap "job-config" not found'
    cluster.notes = (Note(cluster.uid("master"), "FailedMount", message),)
    cluster.settle()
    assert cluster.status["reason"] == "ConfigMapNotFound"
    assert "kubectl delete pytorchjob job" in cluster.status["message"]
    cluster.lose_child()
    everybody(cluster)
    assert "job-config" in cluster.maps
    assert cluster.status["state"] == "Running"


def relative(name: str, outcome: str = "", parents: tuple[str, ...] = ()) -> Relative:
    output = OUTPUT.to_wire() if outcome == "Succeeded" else None
    return Relative(name, f"{name}-uid", "Pretrain", outcome, "StorageFull", parents, output)


def child_of(name: str) -> Cluster:
    return Cluster(stage="SFT", tuning="Full", model={"fromJob": {"name": name}})


def test_what_an_earlier_job_of_this_name_left_is_no_conflict() -> None:
    """The garbage collector needs a moment; only what is nobody's or somebody else's is worth a person's look."""
    former = Cluster()
    former.settle()
    cluster = Cluster()
    left = cluster.maps["job-config"] = {**former.maps["job-config"]}
    left["metadata"] = {**left["metadata"], "ownerReferences": [{"controller": True, "uid": "former"}]}
    cluster.settle()
    assert cluster.status["reason"] == "CleaningUp"
    assert cluster.condition("Stalled")["status"] == "False"
    left["metadata"] = {**left["metadata"], "ownerReferences": []}
    cluster.settle()
    assert cluster.status["reason"] == "NameConflict"
    del cluster.maps["job-config"]
    cluster.settle()
    assert cluster.child is not None


def test_from_job() -> None:
    cluster = child_of("base")
    cluster.settle()
    assert (cluster.status["reason"], cluster.condition("Suspended")["status"]) == ("WaitingForDependency", "True")
    cluster.family = {"base": relative("base", parents=("older",))}
    cluster.settle()
    assert "base, which waits for older, which does not exist" in cluster.status["message"]
    cluster.family = {"base": replace(relative("base", "Succeeded"), lineage=({"job": "root", "uid": "r"},))}
    cluster.settle()
    assert cluster.child is not None
    assert [entry["job"] for entry in cluster.status["lineage"]] == ["root", "base"]
    assert cluster.status["model"]["displayName"] == "base"


def test_from_job_that_failed() -> None:
    cluster = child_of("base")
    cluster.family = {"base": relative("base", "Failed")}
    cluster.settle()
    assert (cluster.status["state"], cluster.status["reason"]) == ("Failed", "DependencyFailed")


def test_from_job_in_a_circle() -> None:
    cluster = child_of("a")
    cluster.family = {"a": relative("a", parents=("b",)), "b": relative("b", parents=("job",))}
    cluster.settle()
    assert cluster.status["reason"] == "DependencyCycle"
    assert "job -> a -> b -> job" in cluster.status["message"]


def test_from_job_of_others_in_a_circle() -> None:
    """They have not failed yet: this job waits, and says for what."""
    cluster = child_of("a")
    cluster.family = {"a": relative("a", parents=("b",)), "b": relative("b", parents=("a",))}
    cluster.settle()
    assert cluster.status["reason"] == "WaitingForDependency"
    assert "a, which waits for b, which waits for a again" in cluster.status["message"]


def test_a_running_job_needs_its_parent_no_more() -> None:
    cluster = child_of("base")
    cluster.family = {"base": relative("base", "Succeeded")}
    everybody(cluster)
    cluster.family = {}
    cluster.settle()
    assert cluster.status["state"] == "Running"


def test_a_job_that_has_to_be_made_again_needs_its_parent_no_more_either() -> None:
    """Its PyTorchJob is deleted after the parent was; it goes on with the very same configuration."""
    cluster = child_of("base")
    cluster.family = {"base": relative("base", "Succeeded")}
    everybody(cluster)
    before = dict(cluster.maps["job-config"]["metadata"])
    cluster.family = {"base": replace(relative("base"), uid="another of this name")}
    cluster.lose_child()
    everybody(cluster)
    assert (cluster.status["state"], cluster.status["attempts"]) == ("Running", 2)
    assert cluster.maps["job-config"]["metadata"] == before
    assert cluster.status["lineage"] == [
        {"job": "base", "uid": "base-uid", "stage": "Pretrain", "outputDigest": "sha256:a"}
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"base": {"name": "base"}}', '{"base": 1}'])
def test_parents_that_cannot_be_read_are_not_known(text: str) -> None:
    assert read(text) == {}


def test_parents_are_kept_whole() -> None:
    family = {"a": replace(relative("a", "Succeeded", ("b",)), lineage=({"job": "root"},)), "b": relative("b")}
    assert read(written(family, ["a"])) == {"a": family["a"]}


def test_the_loop_must_have_started() -> None:
    cluster = ready_cluster()
    assert cluster.status["state"] == "Initializing"
    cluster.report(phase="Loading")
    cluster.settle()
    assert cluster.status["state"] == "Initializing"
    cluster.report(phase="Training")
    cluster.settle()
    assert cluster.status["state"] == "Running"


def test_without_reports_ready_pods_count_as_running_after_a_while() -> None:
    cluster = ready_cluster()
    cluster.pass_time(cluster.timing.silence)
    cluster.settle()
    assert cluster.status["state"] == "Running"


def test_reported_facts_are_kept() -> None:
    cluster = running_cluster()
    saved = {"step": 10, "time": "2026-01-01T00:00:00Z", "uri": "u", "sizeBytes": 1, "digest": "sha256:1"}
    cluster.report(phase="Training", checkpoint=saved, dataReport={"rows": 2, "used": 2, "tokens": 9})
    cluster.settle()
    cluster.report(phase="Training", checkpoint={**saved, "step": 20, "digest": "sha256:2"})
    cluster.settle()
    assert cluster.status["checkpoints"] == {"last": {**saved, "step": 20, "digest": "sha256:2"}, "count": 2}
    assert cluster.status["dataReport"]["rows"] == 2


def test_the_best_evaluation_stays_beside_the_last_checkpoint() -> None:
    cluster = running_cluster()
    saved = {"step": 10, "time": "2026-01-01T00:00:00Z", "uri": "u", "sizeBytes": 1, "digest": "sha256:1"}
    best = {"step": 8, "metric": "eval_loss", "value": 0.5, "uri": "pvc://c/j/u/best"}
    cluster.report(phase="Training", checkpoint=saved, best=best)
    cluster.settle()
    cluster.report(phase="Training", checkpoint={**saved, "step": 20, "digest": "sha256:2"}, best=best)
    cluster.settle()
    assert cluster.status["checkpoints"]["best"] == best
    assert cluster.status["checkpoints"]["last"]["step"] == 20
    better = {**best, "step": 30, "value": 0.25}
    output = {"uri": "pvc://c/j/u/output", "digest": "d", "format": "peft", "sizeBytes": 1}
    last = {"kind": "success", "step": 40, "output": output, "best": better}
    cluster.end(cluster.uid("master"), 0, json.dumps(last))
    cluster.settle()
    assert cluster.status["checkpoints"]["best"] == better
    assert cluster.status["checkpoints"]["last"]["step"] == 20


@pytest.mark.parametrize("told_by", ["report", "record"])
def test_a_best_that_is_lost_is_no_longer_shown(told_by: str) -> None:
    """Its checkpoint was damaged: the trainer goes on from the last one and tells no best with it."""
    cluster = running_cluster()
    saved = {"step": 10, "time": "2026-01-01T00:00:00Z", "uri": "u", "sizeBytes": 1, "digest": "sha256:1"}
    best = {"step": 8, "metric": "eval_loss", "value": 0.5, "uri": "pvc://c/j/u/best"}
    cluster.report(phase="Training", checkpoint=saved, best=best)
    cluster.settle()
    assert cluster.status["checkpoints"]["best"] == best
    if told_by == "report":
        cluster.report(phase="Training", checkpoint=saved)
    else:
        output = {"uri": "pvc://c/j/u/output", "digest": "d", "format": "peft", "sizeBytes": 1}
        last = {"kind": "success", "step": 40, "output": output, "checkpoint": saved}
        cluster.end(cluster.uid("master"), 0, json.dumps(last))
    cluster.settle()
    assert cluster.status["checkpoints"] == {"last": saved, "count": 1}
