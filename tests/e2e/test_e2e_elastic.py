"""A training goes on on other numbers of nodes, 2 -> 1 -> 2, each job on a claim that was made for it; what becomes of
such a claim, and what is said where it has no volume. The job that nothing happens to is also what one is held against
that saves over the memory of its nodes and is killed before a save is on the storage."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fault_kit
import pytest
from e2e_kit import Bench, Manifest, condition, job, stalled

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

EVERY, STEPS = 2, 6
PACE = 2.0
"""Seconds before each step of the job that is killed: a save is committed at the end of the step after it."""
MADE = {"storage": {"claimName": None, "size": "1Gi"}}


def part(name: str, nodes: int, steps: int, **start: Manifest | str) -> Manifest:
    """A job to `steps`, all its checkpoints kept, on a claim of its own."""
    training = {"maxSteps": steps, "schedule": "Constant", "warmupSteps": 0}
    checkpoint = {"everySteps": EVERY, "keepLast": 5, **start}
    return job(name, training=training, checkpoint=checkpoint, resources={"nodes": nodes}, **MADE)


@pytest.fixture(scope="module")
def started(bench: Bench) -> Bench:
    """`wide` alone from the first step to the last; then `narrow` and `again`, which go on from its first checkpoint,
    and `staged`, the same job as `wide`."""
    bench.apply(
        part("wide", 2, STEPS),
        job("nowhere", storage={"claimName": None, "size": "1Gi", "storageClassName": "nowhere"}),
        job("given-up", training={"maxSteps": 1}, storage={"claimName": None, "size": "1Gi", "retain": False}),
    )
    last = bench.succeeded("wide")["checkpoints"]["last"]["uri"]
    first = last.replace(f"step-{STEPS:06d}", f"step-{EVERY:06d}")
    assert first != last
    fault_kit.install(bench)
    bench.apply(
        paced(part("staged", 2, STEPS, staging="Memory")),
        part("narrow", 1, 2 * EVERY, **{"from": {"uri": first}}),
        part("again", 2, STEPS, **{"from": {"fromJob": {"name": "narrow"}}}),
    )
    return bench


@pytest.fixture(scope="module")
def trained(started: Bench, killed: Killed) -> Bench:
    """All of them; `staged` was killed on its way."""
    started.succeeded("again", 500)
    return started


def paced(made: Manifest) -> Manifest:
    made["spec"]["env"] = fault_kit.paced(made["metadata"]["name"], PACE)
    return made


@dataclass(frozen=True)
class Killed:
    """The job `staged` when a rank of it was killed. `mounted`: whether what it had staged lay on a volume."""

    pods: list[dict[str, Any]]
    mounted: bool


@pytest.fixture(scope="module")
def killed(started: Bench) -> Killed:
    """Kills the rank of the second pod while the second save is on its nodes and not committed: it is stopped first, so
    that there is time to look."""
    started.until("staged", lambda status: condition(status, "Running").get("status") == "True")
    folder = started.run_folder("staged", "staged")
    appears(started, folder, f"step-{EVERY:06d}")
    pid, pods = fault_kit.process_of(started, "staged", 1), started.pods("staged")
    appears(started, folder, f"step-{2 * EVERY:06d}.tmp-*")
    os.kill(pid, signal.SIGSTOP)
    local = Path(f"/proc/{pid}/root/work/staging/rank-00001")
    found = Killed(pods, any(local.iterdir()) and local.parent.is_mount())
    os.kill(pid, signal.SIGKILL)
    return found


def appears(bench: Bench, folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 300
    while not list((folder / "checkpoints").glob(pattern)):
        assert not (folder / "output").exists(), f"no {pattern} was ever there"
        assert time.monotonic() < deadline, bench.story("staged")
        time.sleep(0.02)


def lines(bench: Bench, name: str) -> dict[int, dict[str, Any]]:
    text = (bench.run_folder(name, name) / "metrics.jsonl").read_text()
    return {line["step"]: line for line in map(json.loads, text.splitlines())}


def test_what_comes_out_is_what_one_job_gives(trained: Bench) -> None:
    whole = lines(trained, "wide")
    assert sorted(whole) == list(range(1, STEPS + 1))
    assert len({line["loss"] for line in whole.values()}) == STEPS
    for name, steps in (("narrow", (3, 4)), ("again", (5, 6))):
        parts = lines(trained, name)
        assert sorted(parts) == list(steps)
        for step in steps:
            assert parts[step]["loss"] == pytest.approx(whole[step]["loss"], rel=1e-6)
            assert parts[step]["num_tokens"] == whole[step]["num_tokens"]


def test_the_status_says_where_it_comes_from(trained: Bench) -> None:
    status = trained.status("again")
    assert [entry["job"] for entry in status["lineage"]] == ["narrow"]
    assert status["resolved"]["checkpoint"]["from"].startswith("pvc://narrow/narrow/")
    assert {trained.status(name)["resolved"]["deepspeed"]["zeroStage"] for name in ("wide", "again")} == {2}
    assert trained.status("narrow")["resolved"]["deepspeed"]["zeroStage"] == 0


def test_what_is_staged_in_memory_lies_on_a_volume_of_every_pod(killed: Killed) -> None:
    assert killed.mounted
    assert len(killed.pods) == 2
    for pod in killed.pods:
        assert {"name": "staging", "emptyDir": {"medium": "Memory"}} in pod["spec"]["volumes"]


def test_a_save_that_is_only_on_the_nodes_is_lost_with_a_process_and_no_other(trained: Bench, killed: Killed) -> None:
    status, story = trained.succeeded("staged", 500), trained.story("staged")
    assert status["attempt"]["number"] == 2, story
    assert status["restarts"]["byCause"] == {"ProcessKilled": 1}, story
    assert fault_kit.resumed_at(trained, "staged") == EVERY, story
    assert weights(trained, "staged") == weights(trained, "wide")
    assert losses(trained, "staged") == losses(trained, "wide")


def test_staged_checkpoints_are_those_of_a_job_that_stages_none(trained: Bench, killed: Killed) -> None:
    trained.succeeded("staged", 500)
    assert saved(trained, "staged") == saved(trained, "wide")


def weights(bench: Bench, name: str) -> bytes:
    (path,) = (bench.run_folder(name, name) / "output").rglob("*.safetensors")
    return path.read_bytes()


def losses(bench: Bench, name: str) -> dict[int, float]:
    return {step: line["loss"] for step, line in lines(bench, name).items()}


def saved(bench: Bench, name: str) -> dict[str, str]:
    """Digest of every file below checkpoints/, less of those that tell times."""
    folder = bench.run_folder(name, name) / "checkpoints"
    return {
        str(path.relative_to(folder)): "" if path.suffix == ".json" else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_claim_stays_unless_the_job_says_otherwise(trained: Bench) -> None:
    trained.succeeded("given-up")
    trained.kubectl("delete", "ptj", "narrow", "given-up")
    deadline = time.monotonic() + 120
    while trained.find("pvc", "given-up") is not None:
        assert time.monotonic() < deadline, trained.kubectl("describe", "pvc", "given-up")
        time.sleep(0.5)
    assert trained.get("pvc", "narrow")["status"]["phase"] == "Bound"


def test_a_class_that_does_not_exist_is_named(trained: Bench) -> None:
    status = trained.until("nowhere", stalled("StorageNotFound"))
    assert 'storageclass.storage.k8s.io "nowhere" not found' in status["message"]
