"""How pods' ends are read: by exit code, termination message and the pod's own state, and which is the cause."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain_api.reasons import Reason
from posttrain_api.records import Failure, render_termination
from posttrain_operator.reconcile.ends import Fate, cause_of, read_end, read_ends
from posttrain_operator.records import PodRecord
from posttrain_operator.slim import pod_record

R = Reason


def pod(
    code: int | None = None, message: str = "", reason: str = "Error", at: str = "2026-01-01T00:00:00Z", **status: Any
) -> PodRecord:
    """A worker that ended; `code` None: no container of ours did."""
    name = status.pop("name", "job-worker-0")
    terminated = {"exitCode": code, "message": message, "reason": reason, "finishedAt": at}
    container = {"name": "pytorch", "state": {"terminated": terminated}}
    role, index = name.split("-")[1:]
    labels = {
        "posttrain.dev/job-name": "job",
        "training.kubeflow.org/replica-type": role,
        "training.kubeflow.org/replica-index": index,
    }
    record = pod_record(
        {
            "metadata": {"name": name, "namespace": "ns", "uid": name, "resourceVersion": "1", "labels": labels},
            "status": {"phase": "Failed", **({"containerStatuses": [container]} if code is not None else {}), **status},
        }
    )
    assert record is not None
    return record


def said(reason: Reason, code: int, **fields: Any) -> str:
    return render_termination(Failure(reason=reason, message=f"said {reason}", exit_code=code, **fields))


def disrupted(reason: str) -> dict[str, Any]:
    return {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": reason}]}


@pytest.mark.parametrize(
    ("ended", "fate", "reason"),
    [
        (pod(21, said(R.DATA_ROWS_REJECTED, 21)), Fate.PERMANENT, R.DATA_ROWS_REJECTED),
        (pod(51), Fate.PERMANENT, R.STORAGE_FULL),
        (pod(1, "Traceback"), Fate.PERMANENT, R.INTERNAL_ERROR),
        (pod(99), Fate.PERMANENT, R.INTERNAL_ERROR),
        (pod(1, said(R.PEER_LOST, 160)), Fate.PERMANENT, R.INTERNAL_ERROR),
        (pod(137, reason="OOMKilled"), Fate.RETRYABLE, R.OUT_OF_MEMORY),
        (pod(137, said(R.OUT_OF_MEMORY, 137)), Fate.RETRYABLE, R.OUT_OF_MEMORY),
        (pod(137), Fate.RETRYABLE, R.PROCESS_KILLED),
        (pod(139), Fate.RETRYABLE, R.PROCESS_KILLED),
        (pod(143), Fate.RETRYABLE, R.PREEMPTED),
        (pod(160, said(R.PEER_LOST, 160)), Fate.RETRYABLE, R.PEER_LOST),
        (pod(161), Fate.RETRYABLE, R.HANG),
        (pod(190, said(R.TRAINER_ERROR, 190)), Fate.RETRYABLE, R.TRAINER_ERROR),
        (pod(190, said(R.STORAGE_FULL, 51)), Fate.RETRYABLE, R.TRAINER_ERROR),
        (pod(143, **disrupted("DeletionByTaintManager")), Fate.RETRYABLE, R.NODE_LOST),
        (pod(143, **disrupted("PreemptionByScheduler")), Fate.RETRYABLE, R.PREEMPTED),
        (pod(51, **disrupted("PreemptionByScheduler")), Fate.PERMANENT, R.STORAGE_FULL),
        (pod(None), Fate.RETRYABLE, R.PEER_LOST),
        (pod(0, reason="Completed"), Fate.DONE, None),
        (pod(None).as_gone(), Fate.RETRYABLE, R.PEER_LOST),
    ],
)
def test_what_an_end_means(ended: PodRecord, fate: Fate, reason: Reason | None) -> None:
    end = read_end(ended)
    assert (end.fate, end.reason) == (fate, reason)


@pytest.mark.parametrize(
    ("message", "reason"),
    [("The node was low on resource: memory.", R.OUT_OF_MEMORY), ("low on: ephemeral-storage", R.PREEMPTED)],
)
def test_evictions(message: str, reason: Reason) -> None:
    evicted = {"phase": "Failed", "reason": "Evicted", "message": message}
    record = pod_record(
        {
            "metadata": {
                "name": "job-worker-0",
                "namespace": "ns",
                "uid": "u",
                "resourceVersion": "1",
                "labels": {"posttrain.dev/job-name": "job"},
            },
            "status": evicted,
        }
    )
    assert record is not None
    assert read_end(record).reason == reason


def test_the_first_failing_rank_in_time_is_the_cause_and_lost_peers_are_not() -> None:
    ends = read_ends(
        [
            pod(160, said(R.PEER_LOST, 160, time="2026-01-01T00:00:01Z"), name="job-master-0"),
            pod(137, reason="OOMKilled", at="2026-01-01T00:00:03Z", name="job-worker-1"),
            pod(
                190,
                said(R.TRAINER_ERROR, 190, time="2026-01-01T00:00:02.5Z"),
                at="2026-01-01T00:00:09Z",
                name="job-worker-0",
            ),
        ]
    )
    assert cause_of(ends).pod.name == "job-worker-0"
    assert cause_of(ends[:1]).reason is R.PEER_LOST


def test_the_failure_tells_what_is_known() -> None:
    ended = pod(51, said(R.STORAGE_FULL, 51, rank=3, step=8, log_tail="tail"))
    assert read_end(ended).to_failure() == {
        "reason": "StorageFull",
        "message": "said StorageFull",
        "replica": "worker-0",
        "rank": 3,
        "exitCode": 51,
        "step": 8,
        "logTail": "tail",
    }


def test_a_container_that_left_no_word_is_told_by_its_log_and_its_code() -> None:
    """The launcher itself was killed: the kubelet gives the end of the log in place of its last word."""
    log = "step 7\n" + "x" * 3000
    failure = read_end(pod(137, log)).to_failure()
    assert failure["logTail"] == log[-2048:]
    assert (failure["exitCode"], failure["signal"]) == (137, 9)
    assert "ended with exit code 137" in failure["message"]


@pytest.mark.parametrize(
    ("code", "reason", "signal"), [(190, "Error", None), (128, "StartError", None), (143, "Error", 15)]
)
def test_a_code_of_ours_is_no_signal(code: int, reason: str, signal: int | None) -> None:
    failure = read_end(pod(code, "why", reason)).to_failure()
    assert failure.get("signal") == signal
    assert failure.get("logTail") == (None if reason == "StartError" else "why")
