"""How a job ends: rank 0's success record, an end that is permanent, a child that gave up, a deadline. Pure."""

from __future__ import annotations

from datetime import datetime

from posttrain_api.reasons import Reason
from posttrain_operator import clock
from posttrain_operator.facts import JobFacts, Observation
from posttrain_operator.reconcile import deadlines
from posttrain_operator.reconcile.attempt import AttemptView
from posttrain_operator.reconcile.ends import Fate, PodEnd, read_ends, replica
from posttrain_operator.status import accounting, learned
from posttrain_operator.status.verdict import Verdict, failed, starting, succeeded


def ending(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict | None:
    """The final verdict, or a wait for what is still on its way; None where the job goes on."""
    # Of all pods, recorded or not: a replacement may have run to its end before anybody looked.
    ends = read_ends(view.pods)
    found = _success(job, ends) or _permanent(ends) or _child_verdict(seen, ends, now)
    found = found or deadlines.active(job, now) or (None if _has_begun(job, view) else deadlines.startup(job, now))
    if found is None or found.state not in ("Succeeded", "Failed"):
        return found
    return found.having(usage=accounting.closing(job, now, lost=found.state == "Failed"))


def _has_begun(job: JobFacts, view: AttemptView) -> bool:
    return job.holds("Running") and not view.closed


def _success(job: JobFacts, ends: list[PodEnd]) -> Verdict | None:
    end = next((end for end in ends if end.fate is Fate.SUCCESS and end.pod.role == "Master"), None)
    if end is None or end.success is None:
        return None
    record = end.success
    message = f"finished after step {record.step}; output {record.output.uri}"
    return succeeded(message).having(**learned.succeeded(job.status, record))


def _permanent(ends: list[PodEnd]) -> Verdict | None:
    end = next((end for end in ends if end.fate is Fate.PERMANENT), None)
    return failure_of(end) if end else None


def failure_of(end: PodEnd, reason: Reason | None = None) -> Verdict:
    """Failed by one pod's end; `reason` where the job's is another than the pod's."""
    cause = end.reason or Reason.INTERNAL_ERROR
    return failed(reason or cause, described(end)).having(failure=end.to_failure())


def described(end: PodEnd) -> str:
    """`master-0 (rank 0, step 12, node a): no space left`."""
    said = end.failure
    marks = [f"rank {said.rank}"] if said and said.rank is not None else []
    marks += [f"step {said.step}"] if said and said.step is not None else []
    marks += [f"node {end.pod.node}"] if end.pod.node else []
    return f"{replica(end.pod)}" + (f" ({', '.join(marks)})" if marks else "") + f": {end.message}"


def _child_verdict(seen: Observation, ends: list[PodEnd], now: datetime) -> Verdict | None:
    """The child has ended and no pod's end explains it yet: a short wait, then what the child says counts."""
    child = seen.child
    if child is None:
        return None
    if child.holds("Succeeded"):
        return _silent_success(seen, ends, now)
    if child.holds("Failed"):
        found = child.conditions["Failed"]
        if _waited(found.since, now) < seen.timing.settle:
            message = f"the {child.kind} has failed; its pods' ends are being read"
            return starting("Initializing", "Ending", message).after(1)
        return failed(Reason.INTERNAL_ERROR, f"the {child.kind} failed and no pod says why: {found.message}")
    return None


def _silent_success(seen: Observation, ends: list[PodEnd], now: datetime) -> Verdict:
    """Exit code 0 without a success record: nobody knows where a model is, so that is no success."""
    assert seen.child is not None
    master = next((end for end in ends if end.pod.role == "Master" and end.fate is Fate.DONE), None)
    waited = _waited(seen.child.conditions["Succeeded"].since, now)
    if master is None and waited < seen.timing.success:
        return starting("Initializing", "Ending", "the pods have ended; rank 0's success record is awaited").after(1)
    return failed(
        Reason.INTERNAL_ERROR,
        "the pods ended with exit code 0 but rank 0 left no success record, so there is no known output; "
        "the image must run posttrain_trainer",
    )


def _waited(since: str | None, now: datetime) -> float:
    waited = clock.seconds_since(since, now)
    return float("inf") if waited is None else waited
