"""`posttrain run`: the same jobs without a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e_kit import PAIRS, TEXTS, TINY, TINY_SFT, Manifest, job

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("local-run")]

RUN = [sys.executable, "-m", "posttrain_cli", "run"]
TEXT_MAP = {
    "apiVersion": "v1",
    "kind": "ConfigMap",
    "metadata": {"name": "texts"},
    "data": {"text.jsonl": "".join(json.dumps(row) + "\n" for row in TEXTS)},
}
FROM_MAP = {"train": [{"uri": "configmap://texts/text.jsonl"}]}


def write(folder: Path, *manifests: Manifest) -> Path:
    path = folder / "jobs.yaml"
    path.write_text(yaml.safe_dump_all(manifests))
    return path


def run(folder: Path, file: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*RUN, str(file), "--workdir", str(folder / "work"), "--cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, **options)


def results(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each["status"] for each in yaml.safe_load_all(done.stdout) if each}


def test_two_jobs_of_one_file_run_in_order_and_hand_over(tmp_path: Path) -> None:
    pairs = tmp_path / "work" / "volumes" / "sets"
    pairs.mkdir(parents=True)
    (pairs / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    base = job("base", TINY, data=FROM_MAP)
    tuned = job(
        "tuned",
        TINY_SFT,
        model={"uri": None, "fromJob": {"name": "base"}},
        data={"train": [{"uri": "pvc://sets/pairs.jsonl"}]},
        resources={"nodes": 2, "gpusPerNode": 1},
    )
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "runs"}}
    done = run(tmp_path, write(tmp_path, claim, TEXT_MAP, base, tuned))
    assert done.returncode == 0, done.stderr
    status = results(done)
    assert [each["state"] for each in status.values()] == ["Succeeded", "Succeeded"]
    assert status["tuned"]["resources"] == {"gpus": 2, "pods": 2}
    output = tmp_path / "work" / "volumes" / status["tuned"]["output"]["uri"].removeprefix("pvc://")
    assert (output / "adapter_config.json").exists()
    assert "PersistentVolumeClaim/runs is left alone" in done.stderr
    assert "CPU" in done.stderr


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    steps = 150
    file = write(tmp_path, TEXT_MAP, job("long", TINY, data=FROM_MAP, training={"maxSteps": steps, "batchSize": 16}))
    command = [*RUN, str(file), "--workdir", str(tmp_path / "work"), "--cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_steps(tmp_path / "work" / "volumes" / "runs" / "long", 5)
        os.kill(process.pid, signal.SIGINT)
        out, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    stopped = yaml.safe_load(out)
    assert stopped["status"]["state"] == "Suspended"
    done = run(tmp_path, file)
    assert done.returncode == 0, done.stderr
    uid = yaml.safe_load(done.stdout)["metadata"]["uid"]
    assert uid == stopped["metadata"]["uid"]
    lines = (tmp_path / "work" / "volumes" / "runs" / "long" / uid / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))


def wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        files = list(folder.glob("*/metrics.jsonl"))
        if files and len(files[0].read_text().splitlines()) >= steps:
            return
        time.sleep(0.1)
    raise AssertionError(f"no {steps} steps in {folder}")


def test_a_failing_job_says_why_and_stops_the_file(tmp_path: Path) -> None:
    (tmp_path / "work" / "volumes" / "runs").mkdir(parents=True)
    bad = job("bad", TINY, data={"train": [{"uri": "pvc://runs/none.jsonl"}]})
    done = run(tmp_path, write(tmp_path, bad, job("never", TINY)))
    assert done.returncode == 1
    status = results(done)
    assert list(status) == ["bad"]
    assert status["bad"]["failure"]["reason"] == "DatasetNotFound"
    assert "none.jsonl" in done.stderr


def test_an_invalid_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    good, wrong = job("good", TINY), job("wrong", TINY_SFT, lora={"rank": 0})
    done = run(tmp_path, write(tmp_path, good, wrong))
    assert done.returncode == 1
    assert "spec.lora.rank" in done.stderr
    assert done.stdout == ""


def test_a_missing_claim_is_named_with_its_folder(tmp_path: Path) -> None:
    done = run(tmp_path, write(tmp_path, job("lost", TINY, data={"train": [{"uri": "pvc://nowhere/x.jsonl"}]})))
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "mkdir" in done.stderr
