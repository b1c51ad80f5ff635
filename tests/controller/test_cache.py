"""The cache: newest wins, the dead stay dead, ends are kept until the status took them."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain_operator.cache import Cache
from posttrain_operator.jobview import CacheView
from posttrain_operator.records import Key
from posttrain_operator.slim import child_record, job_record, pod_record

KEY = Key("ns", "job")


def job(version: int, uid: str = "u", parents: tuple[str, ...] = (), name: str = "job") -> Any:
    spec = {"model": {"fromJob": {"name": parents[0]}}} if parents else {}
    metadata = {"name": name, "namespace": "ns", "uid": uid, "resourceVersion": str(version)}
    return job_record({"metadata": metadata, "spec": spec})


OWNER = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": "job", "uid": "c", "controller": True}


def pod(uid: str, version: int, phase: str = "Running", owner: dict[str, Any] | None = OWNER) -> Any:
    labels = {"posttrain.dev/job-name": "job", "posttrain.dev/job-uid": "u"}
    metadata = {"name": "p", "namespace": "ns", "uid": uid, "resourceVersion": str(version), "labels": labels}
    owners = {"ownerReferences": [owner]} if owner else {}
    return pod_record({"metadata": {**metadata, **owners}, "status": {"phase": phase}})


def test_an_older_version_never_replaces_a_newer_one() -> None:
    cache = Cache()
    cache.put_job(job(10))
    cache.put_job(job(9))
    assert cache.jobs[KEY].resource_version == "10"


def test_what_was_deleted_does_not_come_back_with_a_late_answer() -> None:
    cache = Cache()
    cache.put_job(job(1))
    cache.drop_job(KEY, "u")
    cache.put_job(job(2))
    assert KEY not in cache.jobs
    cache.put_job(job(3, uid="another"))
    assert cache.jobs[KEY].uid == "another"


def test_deleting_the_old_does_not_drop_the_new() -> None:
    cache = Cache()
    metadata = {"name": "job", "namespace": "ns", "resourceVersion": "5"}
    cache.put_child(child_record({"metadata": {**metadata, "uid": "new"}}))
    cache.drop_child(KEY, "old")
    assert [child.uid for child in cache.children(KEY)] == ["new"]


def test_ends_are_kept_until_the_status_took_them() -> None:
    cache = Cache()
    cache.put_job(job(1))
    cache.put_pod(pod("a", 2))
    cache.drop_pod(pod("a", 3, "Failed"))
    cache.put_pod(pod("b", 4))
    assert [(p.uid, p.gone, p.phase) for p in cache.pods(KEY)] == [("a", True, "Failed"), ("b", False, "Running")]
    cache.status_took_ends(KEY, ["a", "b"])
    assert len(cache.pods(KEY)) == 2
    cache.status_took_ends(KEY, ["b"])
    assert [p.uid for p in cache.pods(KEY)] == ["b"]


def leaving(version: int, phase: str, grace: int) -> Any:
    labels = {"posttrain.dev/job-name": "job", "posttrain.dev/job-uid": "u"}
    metadata = {"name": "p", "namespace": "ns", "uid": "a", "resourceVersion": str(version), "labels": labels}
    deletion = {"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": grace}
    owners = {"ownerReferences": [OWNER]}
    return pod_record({"metadata": {**metadata, **owners, **deletion}, "status": {"phase": phase}})


def test_that_a_pod_was_asked_to_end_is_remembered() -> None:
    """A drained pod is deleted with its grace, ends, and goes by a last deletion without one."""
    cache = Cache()
    cache.put_job(job(1))
    cache.put_pod(leaving(2, "Running", 600))
    cache.put_pod(leaving(3, "Failed", 0))
    assert cache.pods(KEY)[0].asked
    cache.drop_pod(leaving(4, "Failed", 0))
    (record,) = cache.pods(KEY)
    assert record.gone
    assert record.asked


def test_deleting_a_pod_that_has_ended_asks_for_nothing() -> None:
    """As the training-operator does with a failed one."""
    cache = Cache()
    cache.put_job(job(1))
    cache.put_pod(pod("a", 2, "Failed"))
    cache.drop_pod(leaving(3, "Failed", 0))
    assert [record.asked for record in cache.pods(KEY)] == [False]


def test_nothing_is_kept_of_jobs_that_are_gone() -> None:
    cache = Cache()
    cache.put_job(job(1))
    cache.put_pod(pod("a", 2))
    cache.drop_job(KEY, "u")
    cache.drop_pod(pod("a", 3))
    assert cache.pods(KEY) == ()


def test_dependents_follow_edits() -> None:
    cache = Cache()
    cache.put_job(job(1, parents=("base",)))
    assert cache.dependents(Key("ns", "base")) == {KEY}
    cache.put_job(job(2, parents=("other",)))
    assert cache.dependents(Key("ns", "base")) == frozenset()
    assert cache.dependents(Key("ns", "other")) == {KEY}


@pytest.mark.parametrize(
    "owner",
    [
        None,
        {**OWNER, "controller": False},
        {**OWNER, "name": "another"},
        {**OWNER, "apiVersion": "apps/v1", "kind": "ReplicaSet"},
    ],
)
def test_a_pod_that_only_wears_the_jobs_labels_is_none_of_its_pods(owner: dict[str, Any] | None) -> None:
    """Else it would count as a replaced pod and the gang would be restarted for it, again and again."""
    cache = Cache()
    cache.put_job(job(1))
    cache.put_pod(pod("made", 2))
    cache.put_pod(pod("dressed", 3, owner=owner))
    assert [p.uid for p in cache.pods(KEY)] == ["made"]
    assert CacheView(cache).pod_uids("ns", "job") == {"made"}
    assert cache.versions("pods").keys() == {"made", "dressed"}
