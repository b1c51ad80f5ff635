"""Gang restarts: one lost pod is the loss of all, so all are deleted and made again. Pure.

First the decision is written (restarts, failure, attempts), then, in a later pass that reads it back, the recorded
pods are deleted, and when all are gone the next set is adopted. Preemption and node loss use up no budget. An end by
SIGTERM that nobody asked for does: an image that always ends so would be restarted for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from posttrain_api.reasons import Reason
from posttrain_operator import clock
from posttrain_operator.actions import Delete, Event, Object
from posttrain_operator.facts import JobFacts, Observation
from posttrain_operator.reconcile import budgets, nodes, pauses
from posttrain_operator.reconcile.attempt import AttemptView, adopted, ripe
from posttrain_operator.reconcile.causes import Cause, cause_from, lost
from posttrain_operator.reconcile.endings import failure_of
from posttrain_operator.reconcile.ends import Fate, PodEnd, cause_of, read_ends
from posttrain_operator.records import PodRecord
from posttrain_operator.status import accounting
from posttrain_operator.status.verdict import Verdict, failed, starting

GRACE_SECONDS = 1


def restarting(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict | None:
    """Carries out a restart that was decided, or decides on one; None where the attempt is whole."""
    if view.closed:
        return _carry_out(job, seen, view, now)
    return _decide(job, seen, view, now)


def _carry_out(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict | None:
    if view.old_live:
        said = str(job.condition("Running").get("reason") or "Restarting")
        reason = "Restarting" if said == Reason.GUARD_SUSPENDED else said  # that word would hold the job again
        message = str(job.status.get("message") or "all pods are deleted and made again")
        verdict = starting("Restarting", reason, message).doing(delete=condemned(view.old_live, seen, now))
        return verdict.after(seen.timing.settle)
    if not view.fresh:
        return None
    wait = ripe(view, seen, now)
    if wait > 0:
        return starting("Restarting" if view.attempts > 1 else "Pending", "Starting", "the pods are being made").after(
            wait
        )
    begun = starting("Initializing", "PodsStarting", f"attempt {view.attempts}: the pods are starting")
    return begun.having(attempts=view.attempts, attempt=adopted(view, view.attempts, now))


def condemned(pods: Iterable[PodRecord], seen: Observation, now: datetime) -> tuple[Delete, ...]:
    """The deletion of pods that have nothing more to save. On a lost node nobody would see their grace."""
    going = [pod for pod in pods if _must_go(pod)]
    graces = [0 if nodes.is_lost(pod, seen, now) else GRACE_SECONDS for pod in going]
    return tuple(Delete(Object.POD, p.name, p.uid, grace) for p, grace in zip(going, graces, strict=True))


def _must_go(pod: PodRecord) -> bool:
    """Not yet on its way, or on its way with a longer grace than a broken gang deserves."""
    return pod.deleting_since is None or (pod.grace or 0) > GRACE_SECONDS


def _decide(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict | None:
    failures = [end for end in read_ends(view.members) if end.fate is Fate.RETRYABLE]
    loss = nodes.loss(view.members, seen, now)
    if loss and all(end.reason is Reason.PEER_LOST for end in failures):
        return _begin(job, view, loss, now)
    wait = _settling(failures, seen, view, now)
    if wait > 0:
        message = "a pod has lost its peers; the cause is being looked for"
        return starting(job.status.get("state", "Running"), "PeerLost", message).after(wait)
    if failures:
        return _restart(job, seen, view, cause_of(failures), now)
    return _replaced(job, seen, view, now) if view.replaced else None


def _settling(failures: list[PodEnd], seen: Observation, view: AttemptView, now: datetime) -> float:
    """Seconds in which a cause may still show: only losses of peers are known, and some pod has not ended."""
    only_losses = failures and all(end.reason is Reason.PEER_LOST for end in failures)
    undecided = any(not pod.ended for pod in view.members)
    if not only_losses or not undecided:
        return 0.0
    age = (now - failures[0].time).total_seconds()
    return min(seen.timing.settle, seen.timing.settle - age) if age > -seen.timing.settle else 0.0


def _replaced(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict:
    """A changed set without an end that explains it: a pod was replaced behind our back, perhaps while no operator
    ran."""
    if not view.old_live:
        return _all_new(job, view, now)
    names = ", ".join(pod.name for pod in view.fresh)
    cause = lost(f"{names} was replaced and its end is not known")
    return _ended(job, cause, now) or _paused(job, seen, _begin(job, view, cause, now), now)


def _paused(job: JobFacts, seen: Observation, decided: Verdict, now: datetime) -> Verdict:
    return decided.having(restarts={**decided.changes["restarts"], **pauses.pause(job, seen, now)})


def _all_new(job: JobFacts, view: AttemptView, now: datetime) -> Verdict:
    """No recorded pod is left and others are there: they are the next attempt, nothing has to be deleted."""
    begun = starting("Initializing", "PodsStarting", f"attempt {view.number + 1}: all pods are new")
    made = [moment for pod in view.fresh if (moment := clock.parse(pod.created))]
    # What the new pods have held and done is theirs, however late it is seen.
    change = min([*made, now])
    usage = accounting.closing(job, change, lost=True)
    return begun.having(attempts=view.number + 1, attempt=adopted(view, view.number + 1, change), usage=usage)


def _restart(job: JobFacts, seen: Observation, view: AttemptView, end: PodEnd, now: datetime) -> Verdict:
    cause = cause_from(end, view)
    if cause.reason is Reason.TRAINER_ERROR and _same_as_last(job, cause.failure):
        return failure_of(end).having(usage=accounting.closing(job, now, lost=True))
    over = _ended(job, cause, now)
    if over:
        return over
    decided = _begin(job, view, cause, now)
    decided = decided if cause.free else _paused(job, seen, decided, now)
    if view.old_live or not view.fresh or "notBefore" in decided.changes["restarts"]:
        return decided
    return decided.having(attempt=adopted(view, view.attempts + 1, now))


def _same_as_last(job: JobFacts, failure: Mapping[str, Any]) -> bool:
    """The same unknown error at the same step twice running: a third time would be the same again."""
    last = job.status.get("failure") or {}
    return last.get("reason") == failure["reason"] and last.get("step") == failure.get("step")


def _ended(job: JobFacts, cause: Cause, now: datetime) -> Verdict | None:
    over = exhausted(job, cause)
    return over.having(usage=accounting.closing(job, now, lost=True)) if over else None


def exhausted(job: JobFacts, cause: Cause) -> Verdict | None:
    """The end of a job whose budget does not allow to restart it for this cause; None where it does."""
    why = budgets.exhausted(job, cause)
    return failed(Reason.RESTART_BUDGET_EXHAUSTED, why).having(failure=dict(cause.failure)) if why else None


def _begin(job: JobFacts, view: AttemptView, cause: Cause, now: datetime) -> Verdict:
    """The decision alone: what it condemns is deleted by the pass that reads it back."""
    attempt = {**(job.status.get("attempt") or {}), "podUIDs": list(view.joined()), "endTime": clock.render(now)}
    number = view.attempts + 1
    verdict = starting("Restarting", cause.reason, f"attempt {number} begins: {cause.told}").having(
        attempts=number,
        attempt={"number": max(1, view.number), **attempt},
        restarts=budgets.counted(job, cause),
        failure=dict(cause.failure),
        usage=accounting.closing(job, now, lost=True),
    )
    return verdict.telling(Event("Warning", cause.reason, f"restarting all pods: {cause.told}")).after(0)


def restart(job: JobFacts, view: AttemptView, cause: Cause, now: datetime) -> Verdict:
    """The decision to restart an attempt that no pod has ended, or the job's end where its budget forbids it."""
    return _ended(job, cause, now) or _begin(job, view, cause, now)


def extended(view: AttemptView, seen: Observation, job: JobFacts, now: datetime) -> Mapping[str, Any] | None:
    """status.attempt with pods that came late to an incomplete set; None where nothing changes."""
    if view.closed or not view.fresh or view.replaced:
        return None
    return {**job.status["attempt"], "podUIDs": list(view.joined())}


def lost_child(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict | None:
    """The child of a running job was deleted by somebody: its pods go with it, and it is made again.

    A suspended job has lost nothing by it, also where it was suspended until a moment ago.
    """
    if not job.has_started or view.closed or job.holds("Suspended"):
        return None
    cause = lost(f"the {job.status['backend'].get('kind', 'child')} was deleted; it is made again")
    return restart(job, view, cause, now)
