"""A job's own claim on a real API server: made once with the chart's rights, kept or given up with the job, never
somebody else's."""

from __future__ import annotations

import json

import pytest
from operator_kit import Operator, World, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("operator")]


def test_it_is_made_before_the_child_and_stays_with_its_model(world: World, running: Operator) -> None:
    world.job("own", storage={"size": "3Gi", "storageClassName": "fast"})
    child = world.child("own")
    claim = world.get("pvc", "own")
    assert claim is not None
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]  # two nodes
    assert claim["spec"]["resources"]["requests"]["storage"] == "3Gi"
    assert claim["spec"]["storageClassName"] == "fast"
    assert "ownerReferences" not in claim["metadata"]
    volumes = child["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["volumes"]
    assert {"name": "storage", "persistentVolumeClaim": {"claimName": "own"}} in volumes
    assert world.until("own", state="Pending")["resolved"]["storage"]["uri"].startswith("pvc://own/own/")
    world.kubectl("delete", "ptj", "own")
    world.job("own", storage={"size": "9Gi"})
    wait_for(
        lambda: (world.get("pytorchjob", "own") or child)["metadata"]["uid"] != child["metadata"]["uid"], "a child"
    )
    again = world.get("pvc", "own")
    assert again is not None
    assert again["metadata"]["uid"] == claim["metadata"]["uid"]
    assert again["spec"]["resources"]["requests"]["storage"] == "3Gi"


def test_one_that_is_not_retained_has_the_job_as_its_owner(world: World, running: Operator) -> None:
    world.job("short", storage={"size": "1Gi", "retain": False})
    world.child("short")
    claim, job = world.get("pvc", "short"), world.get("ptj", "short")
    assert claim is not None
    assert job is not None
    assert [owner["uid"] for owner in claim["metadata"]["ownerReferences"]] == [job["metadata"]["uid"]]


def test_somebody_elses_is_a_conflict_until_it_is_gone(world: World, running: Operator) -> None:
    world.claim("taken")
    world.job("taken", storage={"size": "1Gi"})
    status = world.until("taken", reason="NameConflict")
    assert "PersistentVolumeClaim named taken" in status["message"]
    assert world.get("pytorchjob", "taken") is None
    world.kubectl("patch", "pvc", "taken", "--type=merge", "-p", json.dumps({"metadata": {"finalizers": None}}))
    world.kubectl("delete", "pvc", "taken", "--wait=false")
    world.child("taken")
    made = world.get("pvc", "taken")
    assert made is not None
    assert made["metadata"]["labels"]["posttrain.dev/job-name"] == "taken"


def test_a_quota_that_is_used_up_is_said(world: World, running: Operator) -> None:
    hard = {"count/persistentvolumeclaims": "1"}
    world.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}, "spec": {"hard": hard}})
    body = json.dumps({"status": {"hard": hard, "used": {"count/persistentvolumeclaims": "1"}}})
    world.kubectl("patch", "resourcequota", "few", "--subresource=status", "--type=merge", "-p", body)
    world.job("third", storage={"size": "1Gi"})
    status = world.until("third", reason="QuotaExceeded")
    assert "persistentvolumeclaims" in status["message"]
    world.kubectl("delete", "resourcequota", "few")
    world.child("third")
