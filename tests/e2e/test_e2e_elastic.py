"""A training goes on on other numbers of nodes, 2 -> 1 -> 2, each job on a claim that was made for it; what becomes of
such a claim, and what is said where it has no volume."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from e2e_kit import Bench, Manifest, job, stalled

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

EVERY, STEPS = 2, 6
MADE = {"storage": {"claimName": None, "size": "1Gi"}}


def part(name: str, nodes: int, steps: int, **start: Manifest) -> Manifest:
    """A job to `steps`, all its checkpoints kept, on a claim of its own."""
    training = {"maxSteps": steps, "schedule": "Constant", "warmupSteps": 0}
    checkpoint = {"everySteps": EVERY, "keepLast": 5, **start}
    return job(name, training=training, checkpoint=checkpoint, resources={"nodes": nodes}, **MADE)


@pytest.fixture(scope="module")
def trained(bench: Bench) -> Bench:
    """`wide` alone from the first step to the last; `narrow` and `again` go on from its first checkpoint."""
    bench.apply(
        part("wide", 2, STEPS),
        job("nowhere", storage={"claimName": None, "size": "1Gi", "storageClassName": "nowhere"}),
        job("given-up", training={"maxSteps": 1}, storage={"claimName": None, "size": "1Gi", "retain": False}),
    )
    last = bench.succeeded("wide")["checkpoints"]["last"]["uri"]
    first = last.replace(f"step-{STEPS:06d}", f"step-{EVERY:06d}")
    assert first != last
    bench.apply(
        part("narrow", 1, 2 * EVERY, **{"from": {"uri": first}}),
        part("again", 2, STEPS, **{"from": {"fromJob": {"name": "narrow"}}}),
    )
    bench.succeeded("again", 500)
    return bench


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
