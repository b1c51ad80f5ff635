"""`posttrain run` without training: identity, progress, verdicts, refusals (tests/e2e/test_local_run.py trains)."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from posttrain_api.job import parse_job
from posttrain_api.reasons import Reason
from posttrain_api.records import Failure, Output, Success
from posttrain_cli import run
from posttrain_cli.local import processes
from posttrain_cli.local.documents import sort_documents
from posttrain_cli.local.outcome import PodEnd, Span, may_go_on, status_of
from posttrain_cli.local.progress import Bar, MetricsTail
from posttrain_cli.local.workspace import Workspace
from posttrain_operator.plan.build import build_plan
from posttrain_operator.plan.types import Plan

SHAPE = {"family": "Llama", "vocabSize": 300, "hiddenSize": 32, "layers": 2, "heads": 2}
START = datetime(2030, 1, 1, tzinfo=UTC)
SPAN = Span(START, START + timedelta(seconds=125))
OUTPUT = Output(uri="pvc://runs/a/u/output", digest="sha256:0", format="safetensors", size_bytes=1)


def manifest(**spec: Any) -> dict[str, Any]:
    base = {
        "stage": "Pretrain",
        "model": {"scratch": SHAPE},
        "data": {"train": [{"uri": "pvc://runs/x.jsonl"}]},
        "storage": {"claimName": "runs"},
        "resources": {"nodes": 2, "gpusPerNode": 0, "processesPerNode": 3},
    }
    api = {"apiVersion": "posttrain.dev/v1alpha1", "kind": "PostTrainingJob"}
    return {**api, "metadata": {"name": "a"}, "spec": {**base, **spec}}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, tmp_path / "volumes")


@pytest.fixture
def plan(workspace: Workspace) -> Plan:
    job = parse_job({**manifest(), "metadata": {"name": "a", "uid": workspace.uid(manifest())}})
    return build_plan(job, workspace.settings("a", "runs", allow_cpu=True), {})


def test_the_same_job_keeps_its_uid_and_a_changed_one_gets_another(workspace: Workspace) -> None:
    uid = workspace.uid(manifest())
    assert workspace.uid(manifest(suspend=True, runPolicy={"ttlSecondsAfterFinished": 1})) == uid
    assert workspace.uid(manifest(training={"seed": 1})) != uid
    assert Workspace(workspace.root / "other", workspace.volumes).uid(manifest()) != uid


def test_the_plan_points_into_the_folders_of_this_machine(workspace: Workspace, plan: Plan) -> None:
    assert plan.config.run_dir == str(workspace.volumes / "runs" / "a" / plan.config.job.uid)
    assert plan.config.data.train[0].path == str(workspace.volumes / "runs" / "x.jsonl")


def test_rendezvous_is_that_of_the_training_operator(plan: Plan) -> None:
    variables = processes.rendezvous_variables(plan, 1, 1234)
    wanted = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "3", "PET_NODE_RANK": "1", "PET_MASTER_PORT": "1234"}
    assert wanted.items() <= variables.items()
    assert [processes.pod_name("a", node) for node in range(3)] == ["a-master-0", "a-worker-0", "a-worker-1"]


def test_secrets_of_the_caller_do_not_reach_the_trainer() -> None:
    """But those that fetch models and data; the ranks do not get them either."""
    wanted = {"PATH": "/bin", "HF_TOKEN": "y", "AWS_ENDPOINT_URL": "z", "GOOGLE_APPLICATION_CREDENTIALS": "/k"}
    assert processes.inherited({**wanted, "DATABASE_PASSWORD": "x", "RANK": "3"}) == wanted


def success(name: str) -> PodEnd:
    return PodEnd(name, 0, Success(output=OUTPUT, step=4, metrics={"loss": 0.5}), "")


def failure(name: str, reason: Reason, time: str, code: int) -> PodEnd:
    word = Failure(reason=reason, message=f"{reason} here", exit_code=code, time=time)
    return PodEnd(name, code, word, "")


def test_success_is_the_clusters_shape(plan: Plan) -> None:
    status = status_of(plan, [success("a-master-0"), PodEnd("a-worker-0", 0, None, "")], SPAN, stopped=False)
    assert status["state"] == "Succeeded"
    assert status["duration"] == "2m05s"
    assert status["output"]["uri"] == OUTPUT.uri
    assert status["progress"]["metrics"] == [{"name": "loss", "value": "0.5"}]


def test_the_first_failure_that_is_not_anothers_is_the_cause(plan: Plan) -> None:
    ends = [
        failure("a-master-0", Reason.PEER_LOST, "2030-01-01T00:00:01Z", 160),
        failure("a-worker-0", Reason.NON_FINITE, "2030-01-01T00:00:02Z", 40),
    ]
    status = status_of(plan, ends, SPAN, stopped=False)
    assert (status["state"], status["reason"], status["failure"]["replica"]) == ("Failed", "NonFinite", "a-worker-0")
    assert not may_go_on(status)


def test_a_killed_launcher_may_go_on(plan: Plan) -> None:
    status = status_of(plan, [PodEnd("a-master-0", -9, None, "last line")], SPAN, stopped=False)
    assert status["reason"] == "ProcessKilled"
    assert status["failure"]["logTail"] == "last line"
    assert may_go_on(status)


def test_what_a_guard_suspends_may_go_on(plan: Plan) -> None:
    word = Failure(reason=Reason.GUARD_SUSPENDED, message="kl was 9", exit_code=163, step=6)
    status = status_of(plan, [PodEnd("master-0", 163, word, "")], SPAN, stopped=False)
    assert (status["state"], status["reason"], status["failure"]["step"]) == ("Suspended", "GuardSuspended", 6)
    assert may_go_on(status)


def test_stopping_is_no_failure_and_a_success_stays_one(plan: Plan) -> None:
    ended = failure("a-master-0", Reason.PREEMPTED, "2030-01-01T00:00:01Z", 143)
    assert status_of(plan, [ended], SPAN, stopped=True)["state"] == "Suspended"
    assert status_of(plan, [success("a-master-0")], SPAN, stopped=True)["state"] == "Succeeded"


def test_the_tail_waits_for_whole_lines_and_starts_again_where_the_file_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert not tail.read()
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert tail.read()
    assert tail.last == {"step": 1, "loss": 2}
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n')
    assert tail.read()
    assert tail.last["step"] == 2
    path.write_text('{"step": 1, "loss": 2}\n')
    assert tail.read()
    assert tail.last["step"] == 1


def test_the_bar_is_a_line_now_and_then_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    bar = Bar("a", out, total=4)
    for second, step in enumerate((1, 2, 3)):
        bar.show({"step": step, "loss": 0.25}, now=100.0 + 6 * second)
    bar.close({"step": 4})
    assert out.getvalue().splitlines() == [
        "a [#######.......................] 1/4 loss=0.25",
        "a [######################........] 3/4 loss=0.25",
        "a [##############################] 4/4",
    ]


def test_documents_are_sorted_and_the_others_named() -> None:
    claim = {"kind": "PersistentVolumeClaim", "metadata": {"name": "runs"}}
    documents = sort_documents([claim, manifest(), {"kind": "ConfigMap", "metadata": {"name": "m"}}])
    assert documents.others == ("PersistentVolumeClaim/runs",)
    assert [len(documents.jobs), len(documents.config_maps)] == [1, 1]


def test_without_the_trainer_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "NEEDED", ("torch", "no_such_library"))
    with pytest.raises(run.RunError, match=r"no_such_library missing.*pip install"):
        run.require_trainer()


def test_too_few_gpus_are_refused_with_a_way_out(
    workspace: Workspace, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (workspace.volumes / "runs").mkdir(parents=True)
    gpus = parse_job(
        {**manifest(resources={"nodes": 2, "gpusPerNode": 2}), "metadata": {"name": "a", "uid": plan.config.job.uid}}
    )
    wanted = build_plan(gpus, workspace.settings("a", "runs", allow_cpu=False), {})
    with pytest.raises(run.RunError, match=r"4 GPUs.*has 1.*--cpu"):
        run.check_machine(wanted, workspace, on_cpu=False)


def test_the_command_line_reports_errors_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("a: 1\nb: [\n")
    command = [sys.executable, "-m", "posttrain_cli", "run", str(path), "--workdir", str(tmp_path / "w")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "bad.yaml:3" in done.stderr, done.stderr
    assert json.dumps(done.stdout) == '""'
