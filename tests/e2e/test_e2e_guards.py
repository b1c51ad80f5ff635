"""Guards on a cluster: one that fails the job, one that suspends it until its user has said so, one that warns. The
learning rate rises by 0.001 a step, so that a rule on it is broken in steps that are known."""

from __future__ import annotations

import json

import fault_kit
import pytest
from e2e_kit import Bench, Manifest, condition, job

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

STEPS, PATIENCE = 8, 600
RATE = {"metric": "learning_rate", "above": 0.0035, "forSteps": 2}
"""Broken from step 4 on."""


def _guarded(name: str, rule: Manifest, **changes: object) -> Manifest:
    rising = {"maxSteps": STEPS, "learningRate": 0.009, "warmupSteps": STEPS, "schedule": "Linear"}
    return job(
        name,
        training=rising,
        checkpoint={"everySteps": 1, "keepLast": 1},
        guards={"rules": [rule]},
        **changes,
    )


@pytest.fixture(scope="module")
def guarded(bench: Bench) -> Bench:
    """All jobs at once; the one that warns is slow enough for reports of single steps."""
    fault_kit.install(bench)
    warned = _guarded("warned", {**RATE, "action": "Warn"})
    warned["spec"]["env"] = fault_kit.paced("warned", 2.0)
    bench.apply(
        _guarded("tripped", RATE, resources={"gpusPerNode": 2}),
        _guarded("held", {**RATE, "forSteps": 3, "action": "Suspend"}),
        warned,
        _guarded("unmeasured", {"metric": "kl", "above": 1}),
    )
    return bench


def test_it_fails_and_the_good_checkpoint_stays(guarded: Bench) -> None:
    status = guarded.finished("tripped", PATIENCE)
    assert (status["state"], status["reason"]) == ("Failed", "GuardTripped"), guarded.story("tripped")
    assert "learning_rate was 0.005 at step 5, above 0.0035 in 2 steps running since step 4" in status["message"]
    folder = guarded.run_folder("tripped")
    assert "checkpoints/step-000002 (step 2)" in status["message"]
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-000002", "step-000004"]
    assert not (folder / "output").exists()
    assert status["failure"]["exitCode"] == 41


def test_a_metric_that_the_job_has_not(guarded: Bench) -> None:
    status = guarded.finished("unmeasured", PATIENCE)
    assert (status["state"], status["reason"]) == ("Failed", "InvalidSpec"), guarded.story("unmeasured")
    assert "spec.guards.rules[0].metric: must be measured by this job" in status["message"]


@pytest.mark.faults
def test_it_is_suspended_and_goes_on_when_its_user_says_so(guarded: Bench) -> None:
    status = guarded.until("held", lambda status: status.get("reason") == "GuardSuspended", PATIENCE)
    status = guarded.until("held", lambda status: status.get("state") == "Suspended" and not guarded.pods("held"))
    assert condition(status, "Suspended")["reason"] == "GuardSuspended", guarded.story("held")
    assert "at step 6" in status["message"]
    for suspend, reason in ((True, "UserSuspended"), (False, None)):
        patch = json.dumps({"spec": {"suspend": suspend}})
        guarded.kubectl("patch", "ptj", "held", "--type=merge", "-p", patch)
        if reason:
            guarded.until("held", lambda status: status.get("reason") == "UserSuspended")
    status = guarded.succeeded("held", PATIENCE)
    assert [line["step"] for line in guarded.metrics("held")] == list(range(1, STEPS + 1))
    assert status["attempt"]["number"] == 2
    assert status.get("restarts", {}).get("total", 0) == 0


def test_it_warns_and_trains_on(guarded: Bench) -> None:
    status = guarded.succeeded("warned", PATIENCE)
    assert condition(status, "TrainingHealthy")["status"] == "True"
    told = [each for each in guarded.items("events") if each.get("reason") == "GuardWarned"]
    assert [each["type"] for each in told] == ["Warning"], guarded.story("warned")
    message = told[0].get("message") or told[0].get("note")
    assert "learning_rate was 0.005 at step 5, above 0.0035 in 2 steps running since step 4" in message
