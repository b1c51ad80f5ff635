"""The operator process with its status server, metrics and probes: what a pod is given is all it needs to report."""

from __future__ import annotations

import socket
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import status_kit as kit
from operator_kit import World, operator, wait_for
from prometheus_client.parser import text_string_to_metric_families

from devcluster.testing import Cluster
from posttrain_api import names
from posttrain_api.records import Checkpoint, DataReport, Report
from posttrain_trainer.reporter import Reporter, ReporterTiming

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("operator")]
CHECKPOINT = Checkpoint(step=10, time="2026-03-01T12:00:00Z", uri="pvc://runs/a/b", size_bytes=1, digest="sha256:aa")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(port: int, path: str) -> tuple[int, str]:
    """(code, text); code 0 where nothing listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def samples(port: int) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = text_string_to_metric_families(fetch(port, "/metrics")[1])
    return {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples}


def trainer_environment(world: World, plane: Cluster, master: str, folder: Path) -> dict[str, str]:
    """What the kubelet would make of the pod's template: its environment, and the projected volume's two files."""
    container = (world.get("pod", master) or {})["spec"]["containers"][0]
    environ = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    bundle = wait_for(lambda: world.get("configmap", "job-status-ca"), "the CA ConfigMap")
    (folder / "ca.crt").write_text(next(iter(bundle["data"].values())))
    (folder / "token").write_text(kit.token(plane, master, world.namespace))
    mounted = {Path(environ[name]).name for name in (names.ENV_STATUS_CA, names.ENV_STATUS_TOKEN)}
    assert mounted == {"ca.crt", "token"}
    files = {names.ENV_STATUS_CA: str(folder / "ca.crt"), names.ENV_STATUS_TOKEN: str(folder / "token")}
    return {**environ, **files}


def test_a_pod_reports_with_what_it_is_given(plane: Cluster, world: World, tmp_path: Path) -> None:
    status, metrics = free_port(), free_port()
    options = {
        "STATUS_URL": f"https://localhost:{status}",
        "STATUS_PORT": str(status),
        "STATUS_SECRET": kit.SECRET,
        "METRICS_PORT": str(metrics),
    }
    with operator(plane, tmp_path, **options):
        assert fetch(metrics, "/readyz")[0] == 200
        assert fetch(metrics, "/livez")[0] == 200
        world.job("job")
        pods = world.pods("job")
        for pod in pods:
            world.run_pod(pod)
        environ = trainer_environment(world, plane, pods[0], tmp_path)
        reporter = Reporter.from_env(environ, ReporterTiming(interval=0.2, urgent=0.1, heartbeat=0.5, retry_first=0.2))
        report = Report(phase="Training", step=20, total_steps=80, metrics={"loss": 1.5})
        reporter.report(report)
        world.until("job", state="Running")
        facts = {"checkpoint": CHECKPOINT, "data_report": DataReport(rows=5, used=4, tokens=9)}
        reporter.report(report.model_copy(update={"step": 40, **facts}))
        taken = wait_for(lambda: world.status("job").get("checkpoints"), "the checkpoint in the status")
        assert taken["last"] == CHECKPOINT.to_wire()
        check(world, metrics)
    wait_for(lambda: fetch(metrics, "/livez")[0] == 0, "the operator to be gone")
    with operator(plane, tmp_path, **options):
        reporter.report(report.model_copy(update={"step": 60, **facts}))
        wait_for(lambda: world.status("job").get("progress", {}).get("step") == 60, "reports after a restart")
        reporter.close()


def check(world: World, metrics: int) -> None:
    """The status and the metrics say the same."""
    found: dict[str, Any] = world.status("job")
    assert found["progress"]["display"] == "50 % 40/80"
    assert found["dataReport"]["used"] == 4
    who = {"job_namespace": world.namespace, "job_name": "job"}
    wait_for(
        lambda: samples(metrics).get(("posttraining_job_progress_ratio", frozenset(who.items()))) == 0.5, "the ratio"
    )
    numbers = samples(metrics)
    assert numbers["posttraining_status_reports_total", frozenset({("result", "accepted")})] >= 2
    state = {"job_namespace": world.namespace, "stage": "Pretrain", "state": "Running"}
    assert numbers["posttraining_jobs", frozenset(state.items())] == 1
    created = {"job_namespace": world.namespace, "stage": "Pretrain"}
    assert numbers["posttraining_jobs_created_total", frozenset(created.items())] == 1
    assert numbers["posttraining_job_startup_seconds_count", frozenset({("stage", "Pretrain")})] == 1


def test_without_its_secret_the_operator_works_all_the_same(plane: Cluster, world: World, tmp_path: Path) -> None:
    status = free_port()
    options = {"STATUS_URL": f"https://localhost:{status}", "STATUS_PORT": str(status), "STATUS_SECRET": "not-there"}
    with operator(plane, tmp_path, **options) as process:
        world.job("job")
        for pod in world.pods("job"):
            world.run_pod(pod)
        world.until("job", state="Running")
        assert "the status server did not start" in process.log.read_text()
        with pytest.raises(OSError, match="refused"):
            ssl.create_default_context().wrap_socket(socket.create_connection(("127.0.0.1", status), 2))
        time.sleep(0.1)
        assert process.process.poll() is None
