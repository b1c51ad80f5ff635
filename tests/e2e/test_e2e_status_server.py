"""The status server believes only a job's own pods, and a node without GPUs is never used silently."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from e2e_kit import OPERATOR_NAMESPACE, RELEASE, Bench, Manifest, job, step

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

ASK = """
import json, ssl, sys, urllib.error, urllib.request
token = open('/var/run/neighbour/token').read()
body = json.dumps({'phase': 'Training', 'step': 900000, 'totalSteps': 1000000}).encode()
request = urllib.request.Request(sys.argv[1], data=body, method='POST')
request.add_header('Authorization', 'Bearer ' + token)
request.add_header('Content-Type', 'application/json')
context = ssl._create_unverified_context()
try:
    print('ANSWER', urllib.request.urlopen(request, context=context, timeout=20).status)
except urllib.error.HTTPError as error:
    print('ANSWER', error.code, error.read().decode()[:300])
"""


def neighbour(url: str) -> Manifest:
    """A pod of the same namespace and service account, with a token for the same audience."""
    token = {"serviceAccountToken": {"audience": "posttrain.dev/status", "expirationSeconds": 600, "path": "token"}}
    container = {
        "name": "ask",
        "image": "posttrain-trainer:0.1.0",
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-c", ASK, url],
        "volumeMounts": [{"name": "token", "mountPath": "/var/run/neighbour"}],
    }
    spec = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [{"name": "token", "projected": {"sources": [token]}}],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "neighbour"}, "spec": spec}


def test_a_neighbours_token_is_refused(bench: Bench) -> None:
    bench.apply(job("watched", training={"maxSteps": 100000, "batchSize": 8}))
    bench.until("watched", lambda status: step(status) >= 1)
    path = f"/apis/posttrain.dev/v1alpha1/namespaces/{bench.namespace}/posttrainingjobs/watched/report"
    bench.apply(neighbour(f"https://{RELEASE}.{OPERATOR_NAMESPACE}.svc:10443{path}"))
    bench.kubectl("wait", "pod/neighbour", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    assert "ANSWER 403" in bench.kubectl("logs", "neighbour")
    progress = bench.status("watched")["progress"]
    assert progress["totalSteps"] == 100000, progress
    assert progress["step"] <= 100000, progress
    bench.kubectl("delete", "ptj", "watched")


def test_the_operators_metrics_count_jobs(bench: Bench) -> None:
    path = f"/api/v1/namespaces/{OPERATOR_NAMESPACE}/services/{RELEASE}:metrics/proxy/metrics"
    assert "posttraining_jobs" in bench.cluster.kubectl("get", "--raw", path)


def test_without_a_gpu_the_trainer_refuses_unless_told(bench: Bench, reinstall: Callable[..., Any]) -> None:
    """Last in this file: it changes the operator's settings and changes them back."""
    reinstall("trainer.allowCPU=false")
    try:
        bench.apply(job("strict"))
        status = bench.finished("strict")
    finally:
        reinstall()
    assert (status["state"], status["reason"]) == ("Failed", "ImageIncompatible"), json.dumps(status, indent=1)
    asked = "The job asks for 1 GPUs per pod (resources.gpusPerNode), this pod sees 0."
    assert status["failure"]["message"].startswith(asked), status["failure"]["message"]
