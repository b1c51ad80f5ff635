"""What the case tests of reconcile share: last words of pods, and everybody else doing their part."""

from __future__ import annotations

from typing import Any

from model_cluster import Cluster

from posttrain_api.reasons import Reason
from posttrain_api.records import Failure, Output, Success, render_termination

OUTPUT = Output(uri="pvc://runs/job/output", digest="sha256:a", format="safetensors", size_bytes=1)
SUCCESS = render_termination(Success(output=OUTPUT, step=5))


def said(reason: Reason, code: int, **fields: Any) -> str:
    return render_termination(Failure(reason=reason, message="m", exit_code=code, **fields))


def everybody(cluster: Cluster, rounds: int = 3) -> None:
    """All others do their part, then the operator."""
    for _ in range(rounds):
        cluster.settle()
        cluster.kubelet()
        cluster.training_operator()
        cluster.run_all()
    cluster.settle()


def ready_cluster() -> Cluster:
    """A job with a status server whose pods are ready and have reported nothing yet."""
    cluster = Cluster()
    cluster.bundle = "PEM"
    cluster.settle()
    cluster.training_operator()
    cluster.run_all()
    cluster.settle()
    return cluster
