"""A claim that a job makes for itself: how it looks, when it is made, whose it may be, and what is said when it has no
volume."""

from __future__ import annotations

from typing import Any

import pytest
from model_cluster import SPEC, Cluster, running_cluster
from plan_kit import plan

from posttrain_operator.actions import Object
from posttrain_operator.backends.claims import claim
from posttrain_operator.claimlook import claimed, why_unbound
from posttrain_operator.facts import Missing
from posttrain_operator.reconcile import claims, lookups
from posttrain_operator.slim import pod_record

OWN = {"storage": {"size": "5Gi"}}


def _plan(**storage: Any) -> Any:
    return plan({"spec.storage": {"size": "200Gi", **storage}})


def test_the_plan_of_a_claim() -> None:
    made = _plan()
    assert made.storage_claim == "my-job"
    assert made.config.run_uri == "pvc://my-job/my-job/3f0c"
    assert made.resolved["storage"]["uri"] == "pvc://my-job/my-job/3f0c"
    assert plan().new_claim is None


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, "ReadWriteOnce"),
        ({"spec.resources": {"nodes": 2}}, "ReadWriteMany"),
        ({"spec.storage": {"size": 1024, "accessMode": "ReadWriteMany"}}, "ReadWriteMany"),
    ],
)
def test_several_nodes_share_it(changes: dict[str, Any], mode: str) -> None:
    made = plan({"spec.storage": {"size": "1Ti"}, **changes})
    assert claim(made)["spec"]["accessModes"] == [mode]


def test_a_retained_claim_has_no_owner() -> None:
    """Deleting a job deletes no model."""
    body = claim(_plan(storageClassName="shared"))
    assert body["metadata"]["name"] == "my-job"
    assert "ownerReferences" not in body["metadata"]
    assert body["metadata"]["labels"]["posttrain.dev/job-name"] == "my-job"
    assert body["spec"]["storageClassName"] == "shared"
    assert body["spec"]["resources"] == {"requests": {"storage": "200Gi"}}
    assert "storageClassName" not in claim(_plan())["spec"]


def test_one_that_is_not_goes_with_the_job() -> None:
    (owner,) = claim(_plan(retain=False))["metadata"]["ownerReferences"]
    assert (owner["name"], owner["uid"], owner["controller"]) == ("my-job", "3f0c", True)


def test_another_claim_is_another_plan() -> None:
    hashes = {made.spec_hash for made in (plan(), _plan(), _plan(retain=False), _plan(storageClassName="x"))}
    assert len(hashes) == 4


@pytest.mark.parametrize("retain", [True, False])
def test_it_is_made_before_the_pods_and_once(retain: bool) -> None:
    cluster = Cluster(storage={"size": "5Gi", "retain": retain})
    made = cluster.step().create
    assert made[0].kind is Object.CLAIM
    assert made[-1].kind.is_child
    cluster.settle()
    assert cluster.claim is not None
    volumes = cluster.child["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["volumes"]  # type: ignore[index]
    assert {"name": "storage", "persistentVolumeClaim": {"claimName": "job"}} in volumes
    assert [create.kind for actions in cluster.history for create in actions.create].count(Object.CLAIM) == 1


def test_a_process_that_died_after_any_write_makes_no_second_one() -> None:
    writes = len(Cluster(**OWN).step().create)
    for done in range(writes + 1):
        cluster = Cluster(**OWN)
        cluster.step(prefix=done)
        cluster.settle()
        assert cluster.claim is not None
        assert cluster.child is not None


def _claim_of(name: str, owner: str | None = None, managed: bool = True, deleting: bool = False) -> dict[str, Any]:
    labels = {"app.kubernetes.io/managed-by": "posttrain-operator", "posttrain.dev/job-name": name} if managed else {}
    metadata: dict[str, Any] = {"name": "job", "uid": "claim-uid", "labels": labels}
    if owner:
        metadata["ownerReferences"] = [{"uid": owner, "controller": True}]
    if deleting:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {"metadata": metadata, "status": {"phase": "Bound"}}


def test_what_an_earlier_job_of_this_name_has_left_is_used_again() -> None:
    cluster = Cluster(**OWN)
    cluster.claim = _claim_of("job")
    cluster.settle()
    assert cluster.child is not None
    assert Object.CLAIM not in [create.kind for actions in cluster.history for create in actions.create]


@pytest.mark.parametrize("found", [_claim_of("other"), _claim_of("job", managed=False)], ids=["another's", "nobody's"])
def test_somebody_elses_is_a_conflict(found: dict[str, Any]) -> None:
    cluster = Cluster(**OWN)
    cluster.claim = found
    cluster.settle()
    assert cluster.status["reason"] == "NameConflict"
    assert (
        "a PersistentVolumeClaim named job exists and was not made for a job of this name" in cluster.status["message"]
    )
    assert cluster.child is None
    cluster.claim = None
    cluster.settle()
    assert cluster.child is not None


@pytest.mark.parametrize(
    "found",
    [_claim_of("job", owner="former"), _claim_of("job", deleting=True), _claim_of("other", deleting=True)],
    ids=["collected", "being deleted", "another's, being deleted"],
)
def test_one_that_goes_is_waited_for(found: dict[str, Any]) -> None:
    cluster = Cluster(**OWN)
    cluster.claim = found
    cluster.settle()
    assert cluster.status["reason"] == "CleaningUp"
    assert cluster.child is None
    cluster.claim = None
    cluster.settle()
    assert cluster.child is not None


def test_one_that_is_gone_is_not_made_again() -> None:
    """A new, empty one would let the training begin anew in silence."""
    cluster = running_cluster(**OWN)
    cluster.claim = None
    cluster.lose_child()
    cluster.kubelet()
    cluster.settle()
    assert cluster.status["reason"] == "StorageNotFound"
    assert "is gone, and its checkpoints with it" in cluster.status["message"]
    assert (cluster.claim, cluster.child) == (None, None)


def test_only_claims_that_must_be_there_are_looked_up() -> None:
    cluster = Cluster(**OWN)
    seen = cluster.observation()
    wanted = lookups.before_start(cluster.facts(), seen.intent, has_child=False)
    assert (wanted.claims, wanted.own_claim) == (("runs",), "job")
    named = Cluster()
    wanted = lookups.before_start(named.facts(), named.observation().intent, has_child=False)
    assert (wanted.claims, wanted.own_claim) == (("runs",), None)


UNBOUND = "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims. not found"
WHY = Missing("StorageNotFound", 'PersistentVolumeClaim job has no volume: storageclass.storage.k8s.io "x" not found')  # type: ignore[arg-type]


@pytest.mark.parametrize("storage", [OWN["storage"], SPEC["storage"]], ids=["made", "named"])
def test_why_it_has_no_volume_is_looked_up_and_said(storage: dict[str, str]) -> None:
    cluster = Cluster(storage=storage)
    cluster.settle()
    cluster.training_operator()
    for pod in cluster.pods.values():
        blocked = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": UNBOUND}
        pod["status"]["conditions"] = [blocked]
        pod["spec"].pop("nodeName", None)
    assert all(claims.waited_for(record) for pod in cluster.pods.values() if (record := pod_record(pod)))
    wanted = lookups.while_running(cluster.facts(), cluster.observation(), cluster.now)
    assert wanted.unbound == (storage.get("claimName", "job"),)
    cluster.unbound = (WHY,)
    cluster.settle()
    assert (cluster.status["reason"], cluster.status["message"]) == ("StorageNotFound", WHY.message)


def test_a_pod_that_waits_for_something_else_asks_for_no_claim() -> None:
    cluster = Cluster(**OWN)
    cluster.room = 0
    cluster.settle()
    cluster.training_operator()
    assert lookups.while_running(cluster.facts(), cluster.observation(), cluster.now).unbound == ()


@pytest.mark.parametrize(
    ("phase", "events", "said"),
    [
        ("Pending", [], ""),
        ("Pending", [{"type": "Normal", "message": "waiting for a volume"}], ""),
        (
            "Pending",
            [
                {"type": "Warning", "message": "old", "lastTimestamp": "2026-01-01T00:00:00Z"},
                {"type": "Warning", "message": "new", "lastTimestamp": "2026-01-01T00:00:09Z"},
            ],
            "new",
        ),
        ("Lost", [], "the volume that it was bound to does not exist any more"),
    ],
)
def test_why(phase: str, events: list[dict[str, str]], said: str) -> None:
    assert why_unbound({"status": {"phase": phase}}, events) == said


def test_a_claim_as_it_is_read() -> None:
    assert claimed(_claim_of("job", owner="u")).owner_uid == "u"
    assert claimed(_claim_of("job", managed=False)).made_for == ""
    assert claimed(_claim_of("job", deleting=True)).deleting
