"""The kind as a user meets it: kubectl explain, get, apply, wait, and numbers that every reader takes alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from devcluster import binaries
from posttrain_api.job import parse_job
from posttrain_cli.manifests import load_documents
from tests.api.rule_cases import job
from tests.api.yaml_cases import SCALARS
from tests.cluster.crd_rig import JOBS, REPOSITORY, Rig

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("crd")]
NOW = "2026-01-31T12:00:00Z"


@pytest.fixture(scope="module")
def running(crd_server: Rig) -> str:
    """A job with a full status; its name."""
    assert crd_server.create(job({"metadata.name": "shown"})).ok
    status: dict[str, Any] = {
        "state": "Running",
        "reason": "Training",
        "duration": "5m",
        "model": {"displayName": "Qwen2.5-1.5B-Instruct"},
        "resources": {"gpus": 1, "pods": 1},
        "restarts": {"total": 2},
        "output": {"uri": "pvc://runs/shown/u/output"},
        "progress": {"display": "46%", "headline": "loss=0.82"},
        "conditions": [
            {"type": "Running", "status": "True", "reason": "Training", "message": "", "lastTransitionTime": NOW}
        ],
    }
    answer = crd_server.merge("shown", {"status": status}, status=True)
    assert answer.ok, answer.text
    return "shown"


def test_get_shows_the_columns(crd_server: Rig, running: str) -> None:
    head, row = crd_server.cluster.kubectl("get", "ptj", running).splitlines()
    assert head.split() == ["NAME", "STAGE", "MODEL", "STATE", "PROGRESS", "GPUS", "DURATION", "AGE"]
    assert row.split()[:7] == ["shown", "SFT", "Qwen2.5-1.5B-Instruct", "Running", "46%", "1", "5m"]
    assert len(row) <= 100


def test_get_wide(crd_server: Rig, running: str) -> None:
    head, row = crd_server.cluster.kubectl("get", "ptj", running, "-o", "wide").splitlines()
    assert head.split()[8:] == ["ALGORITHM", "METRIC", "RESTARTS", "REASON", "OUTPUT"]
    assert row.split()[8:] == ["loss=0.82", "2", "Training", "pvc://runs/shown/u/output"]


def test_names_of_the_kind(crd_server: Rig, running: str) -> None:
    for word in ("ptj", "posttrainingjob", "posttrainingjobs", "posttrainingjobs.posttrain.dev", "posttraining"):
        assert running in crd_server.cluster.kubectl("get", word, "-o", "name")
    assert running not in crd_server.cluster.kubectl("get", "all", "-o", "name"), "delete all must not delete trainings"


@pytest.mark.parametrize(
    ("selector", "there"), [("status.state=Running", True), ("status.state=Failed", False), ("spec.stage=SFT", True)]
)
def test_field_selectors(crd_server: Rig, running: str, selector: str, there: bool) -> None:
    assert (running in crd_server.cluster.kubectl("get", "ptj", f"--field-selector={selector}", "-o", "name")) == there


def test_wait(crd_server: Rig, running: str) -> None:
    assert "condition met" in crd_server.cluster.kubectl(
        "wait", f"ptj/{running}", "--for=condition=Running", "--timeout=10s"
    )


def test_no_scale(crd_server: Rig, running: str) -> None:
    assert "(NotFound)" in crd_server.cluster.kubectl("scale", f"ptj/{running}", "--replicas=2", check=False)


def test_explain_reaches_every_field(crd_server: Rig) -> None:
    text = crd_server.cluster.kubectl("explain", "ptj", "--recursive")
    for field in (
        "tokensPerMicroBatch",
        "zeroStage",
        "everySeconds",
        "terminationGracePeriodSeconds",
        "lastAdvanceTime",
        "podUIDs",
    ):
        assert field in text
    text = crd_server.cluster.kubectl("explain", "ptj.spec.lora.rank")
    assert "Rank r of the adapters. Default: 16. Range: 1 to 512. Example: 16." in text
    assert "enum: Auto, 0, 1, 2, ...." in crd_server.cluster.kubectl("explain", "ptj.spec.deepspeed")


def test_apply_refuses_an_unknown_field(crd_server: Rig) -> None:
    text = crd_server.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(job({"spec.lora.rnak": 3})), check=False)
    assert 'unknown field "spec.lora.rnak"' in text
    assert "not found" in crd_server.cluster.kubectl("get", "ptj", "my-job", check=False)


def test_apply_edit_and_apply_again(crd_server: Rig) -> None:
    text = json.dumps(job({"metadata.name": "edited"}))
    assert "created" in crd_server.cluster.kubectl("apply", "-f", "-", stdin=text)
    assert "unchanged" in crd_server.cluster.kubectl("apply", "-f", "-", stdin=text)
    assert "configured" in crd_server.cluster.kubectl("apply", "-f", "-", stdin=text.replace("16", "32"))
    assert not crd_server.cluster.kubectl("diff", "-f", "-", stdin=text.replace("16", "32"))


def test_unset_stays_unset(crd_server: Rig) -> None:
    stored = crd_server.create(job({"metadata.name": "bare"})).body["spec"]
    assert stored == {**job({})["spec"], "suspend": False}, "the only schema default"


NUMBERS = ("1e-5", "1E-5", "1.e-5", ".00001", "+1e-5", "0.1e-4", "1.0e-05")


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_reads_alike_in_python_kubectl_and_api_server(crd_server: Rig, number: str) -> None:
    text = (
        "apiVersion: posttrain.dev/v1alpha1\nkind: PostTrainingJob\nmetadata: {name: number, namespace: default}\n"
        "spec:\n  stage: SFT\n  lora: {}\n  model: {uri: 'hf://a/b'}\n  data: {train: [{uri: 'pvc://a/b'}]}\n"
        f"  storage: {{claimName: runs}}\n  training:\n    learningRate: {number}\n"
    )
    python = parse_job(load_documents(text)[0].value).spec.training
    kubectl = json.loads(crd_server.cluster.kubectl("create", "--dry-run=client", "-o", "json", "-f", "-", stdin=text))
    # The API server's own YAML reader, no client between.
    server = crd_server.ask("POST", JOBS, text.encode(), "application/yaml", dryRun="All", fieldValidation="Strict")
    assert server.ok, server.text
    assert python is not None
    assert python.learning_rate == 1e-5
    assert kubectl["spec"]["training"]["learningRate"] == 1e-5
    assert server.body["spec"]["training"]["learningRate"] == 1e-5


def test_scalars_read_as_kubectl_reads_them(crd_server: Rig) -> None:
    """Every plain scalar of the table, in one document: the value and its type."""
    lines = "".join(f"  k{number}: {text}\n" for number, text in enumerate(SCALARS))
    text = f"apiVersion: posttrain.dev/v1alpha1\nkind: PostTrainingJob\nmetadata: {{name: scalars}}\nspec:\n{lines}"
    theirs = json.loads(
        crd_server.cluster.kubectl(
            "create", "--dry-run=client", "--validate=false", "-o", "json", "-f", "-", stdin=text
        )
    )["spec"]
    ours = load_documents(text)[0].value["spec"]
    wrong = {
        scalar: (ours[f"k{n}"], theirs[f"k{n}"])
        for n, scalar in enumerate(SCALARS)
        if not same(ours[f"k{n}"], theirs[f"k{n}"])
    }
    assert not wrong


def same(ours: object, theirs: object) -> bool:
    return ours == theirs and isinstance(ours, bool) == isinstance(theirs, bool)


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("examples/*.yaml")), ids=lambda path: path.name)
def test_examples_are_accepted(crd_server: Rig, path: Any) -> None:
    text = crd_server.cluster.kubectl("apply", "--dry-run=server", "-f", str(path))
    assert text.count("created (server dry run)") == len(load_documents(path.read_text()))


def test_the_command_line_is_a_kubectl_plugin() -> None:
    """kubectl takes no flag before a plugin's name, so it is called plainly; it needs no cluster."""
    example = str(REPOSITORY / "examples" / "03-sft-full.yaml")
    done = subprocess.run(
        [str(binaries.binary("kubectl")), "posttrain", "validate", example],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"valid {example}: gsm8k-full\n", done.stderr
