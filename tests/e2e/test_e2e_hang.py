"""A rank that is stopped in the middle: its job is found to stand still, tells where every rank was, and goes on."""

from __future__ import annotations

import signal
from typing import Any

import e2e_models
import fault_kit
import pytest
from e2e_kit import Bench, condition, step

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]
STALL = 20
PATIENCE = 600


def stands_still(status: dict[str, Any]) -> bool:
    health = condition(status, "TrainingHealthy")
    return (health.get("status"), health.get("reason")) == ("False", "NoProgress")


@pytest.fixture(scope="module")
def hung(bench: Bench) -> dict[str, Any]:
    """Rank 1, in the second pod, gets SIGSTOP after a checkpoint; the status once that is known."""
    fault_kit.install(bench)
    words = e2e_models.tokenizer([row["prompt"] for row in fault_kit.PROMPTS])
    e2e_models.save(bench.volume() / "models" / "good", words)
    bench.apply(fault_kit.two_pods("hung", "SFT", runPolicy={"stallSeconds": STALL}))
    fault_kit.in_the_middle(bench, "hung", "SFT").signal_rank(1, signal.SIGSTOP)
    return bench.until("hung", lambda status: stands_still(status) or "failure" in status, PATIENCE)


def test_it_is_told_before_anything_is_restarted(bench: Bench, hung: dict[str, Any]) -> None:
    assert stands_still(hung), bench.story("hung")
    assert hung["attempts"] == 1
    assert "NoProgress" in bench.kubectl("describe", "ptj", "hung")


def test_the_failure_says_where_every_rank_stood(bench: Bench, hung: dict[str, Any]) -> None:
    status = bench.until("hung", lambda status: "failure" in status, PATIENCE)
    failure = status["failure"]
    assert failure["reason"] == "Hang", bench.story("hung")
    assert (failure["rank"], failure["replica"]) == (1, "worker-0"), failure
    assert failure["node"].startswith("node-"), failure
    assert "rank 1: cannot answer: it is stopped (state T" in failure["logTail"]
    waiting = failure["logTail"].partition("rank 0: ")[2]
    assert ".py:" in waiting, failure  # in which collective depends on the moment
    stacks = sorted(path.name for path in (bench.run_folder("hung") / "stacks").iterdir())
    assert stacks == ["1-rank-0.txt", "1-rank-1.txt"]


def test_it_goes_on_from_its_checkpoint(bench: Bench, hung: dict[str, Any]) -> None:
    status = bench.succeeded("hung", PATIENCE)
    assert status["restarts"]["byCause"] == {"Hang": 1}, bench.story("hung")
    assert step(status) == fault_kit.STEPS["SFT"]
    assert "stacks" not in status["progress"]
    assert "stalledTime" not in status["attempt"]
    steps = [line["step"] for line in bench.metrics("hung") if "loss" in line]
    assert steps == list(range(1, fault_kit.STEPS["SFT"] + 1))
