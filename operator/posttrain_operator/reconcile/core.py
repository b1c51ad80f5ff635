"""`reconcile`: one job, one observation, one moment; what is to be done.

Called by the worker for each key of the queue. See the package for the order of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from posttrain_operator import clock
from posttrain_operator.actions import Actions, Create, Delete, Object
from posttrain_operator.backends import backend, configmaps
from posttrain_operator.backends.owned import config_name, status_ca_name
from posttrain_operator.facts import JobFacts, Observation
from posttrain_operator.reconcile import deadlines, nodes
from posttrain_operator.reconcile.attempt import AttemptView, over
from posttrain_operator.reconcile.endings import ending
from posttrain_operator.reconcile.following import conflict, following
from posttrain_operator.reconcile.hangs import hanging, recovered
from posttrain_operator.reconcile.holding import holding
from posttrain_operator.reconcile.intake import intake, refused
from posttrain_operator.reconcile.placement import giving_back
from posttrain_operator.reconcile.restarts import condemned, lost_child, restarting
from posttrain_operator.reconcile.revision import revising
from posttrain_operator.reconcile.suspension import set_suspend, suspension
from posttrain_operator.records import ChildRecord
from posttrain_operator.status.build import build, differs, transitions
from posttrain_operator.status.verdict import Verdict, starting


def reconcile(job: JobFacts, seen: Observation, now: datetime) -> Actions:
    """What to do about `job` (which carries its last status). Never raises for what a user or a cluster can show."""
    if job.deleting:
        return Actions()
    verdict = _after_the_end(job, seen, now) if job.terminal else _verdict(job, seen, now)
    status = build(job, seen.intent, verdict, now)
    write = not verdict.silent and differs(job.status, status)
    wait = verdict.after(None if job.terminal else deadlines.next_look(job, now)).requeue_after
    return Actions(
        create=verdict.create,
        patch=verdict.patch,
        delete=verdict.delete,
        status=status if write else None,
        events=(*verdict.events, *transitions(job, status)) if write else (),
        requeue_after=wait,
        attempt_uids=_settled_uids(status) if seen.child or job.has_started else frozenset(),
    )


def _settled_uids(status: Mapping[str, Any]) -> frozenset[str] | None:
    """The recorded pods, once they are the attempt that runs: until then a pod that died may be the next one's
    failure."""
    attempt = status.get("attempt") or {}
    if not attempt or attempt.get("number") != status.get("attempts"):
        return None
    return frozenset(attempt.get("podUIDs") or ())


def _verdict(job: JobFacts, seen: Observation, now: datetime) -> Verdict:
    view = AttemptView.of(job, seen)
    if seen.child is None:
        return _childless(job, seen, view, now)
    other = conflict(job, seen)
    if other:
        own = seen.child.owner_uid == job.uid
        return (own and (_ended(job, seen, view, now) or holding(job, seen, view, now))) or other
    outdated = _outdated(job, seen)
    if outdated:
        return outdated
    verdict = _followed(job, seen, view, now)
    verdict = verdict.doing(create=_new_bundle(job, seen), delete=_stuck(seen, view, verdict, now))
    verdict = verdict.after(nodes.next_look(view, seen, now))
    return verdict.having(backend=_backend(seen), attempts=verdict.changes.get("attempts", view.attempts))


def _childless(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict:
    return (
        _ended(job, seen, view, now)
        or revising(job, seen, view, now)
        or holding(job, seen, view, now)
        or lost_child(job, seen, view, now)
        or refused(seen)
        or _cleared(job, seen, view, now)
    )


def _ended(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict | None:
    """What the pods of a child that is gone or going have said at their end."""
    return ending(job, seen, view, now) if job.has_started else None


def _cleared(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict:
    """Nothing is made again before the last pod of a lost child is gone; the pods of a new one are the next attempt."""
    if not job.has_started:
        return _unrecorded(job, seen, view, now)
    waiting = restarting(job, seen, view, now) if view.live else None
    if waiting:
        return waiting
    verdict = intake(job, seen, now)
    past = {} if view.live else over(job, view)
    verdict = verdict.having(attempts=max(view.attempts, past.get("number", view.number) + 1))
    if view.closed and not past:
        return verdict
    # Written first: what these said is not the new child's failure, whatever becomes of its making.
    told = replace(verdict, create=(), delete=(), silent=False).after(0)
    return told.having(attempt=past) if past else told


def _unrecorded(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict:
    """There never was a child, or nobody has recorded it before it was deleted: then its pods are no attempt of the
    next one's, and what they said is forgotten."""
    verdict = intake(job, seen, now)
    if not (verdict.silent and view.live):
        return verdict
    message = f"waits until {len(view.live)} pod(s) of a deleted {seen.backend} are gone"
    going = condemned((pod for pod in view.live if pod.deleting_since), seen, now)
    return starting("Pending", "CleaningUp", message).doing(delete=going).after(seen.timing.settle)


def _followed(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict:
    return (
        ending(job, seen, view, now)
        or revising(job, seen, view, now)
        or holding(job, seen, view, now)
        or suspension(job, seen, view, now)
        or restarting(job, seen, view, now)
        or giving_back(job, seen, view, now)
        or hanging(job, seen, view, now)
        or recovered(job, following(job, seen, view, now))
    )


def _stuck(seen: Observation, view: AttemptView, verdict: Verdict, now: datetime) -> tuple[Delete, ...]:
    """What a pass decides is written before the next one deletes for it; and nothing is deleted twice in one."""
    if "failure" in verdict.changes:
        return ()
    going = {delete.uid for delete in verdict.delete}
    return tuple(delete for delete in nodes.stuck(view, seen, now) if delete.uid not in going)


def _backend(seen: Observation) -> dict[str, str]:
    assert seen.child is not None
    child = seen.child
    version = backend(child.kind).API_VERSION
    return {"apiVersion": version, "kind": child.kind, "name": child.key.name, "uid": child.uid}


def _outdated(job: JobFacts, seen: Observation) -> Verdict | None:
    """The spec was edited between the child's creation and its record in the status: the child is made anew. What was
    made for it goes later or with the job: an edit that is taken back meanwhile must find it whole or not at all."""
    plan, child = seen.intent.plan, seen.child
    if plan is None or child is None or job.has_started:
        return None
    if (child.spec_hash, child.kind) == (plan.spec_hash, seen.backend):
        return None
    message = f"the spec was edited; the {child.kind} is made anew"
    return Verdict("Pending", "Starting", message, delete=(_itself(child),), silent=True)


def _whole(child: ChildRecord) -> tuple[Delete, ...]:
    """The child with what was made for it."""
    left = backend(child.kind).left(child.key.name, child.spec_hash)
    support = (Delete(Object(kind), name) for kind, name in left)
    return (*support, _itself(child))


def _itself(child: ChildRecord) -> Delete:
    return Delete(Object(child.kind), child.key.name, child.uid)


def _new_bundle(job: JobFacts, seen: Observation) -> tuple[Create, ...]:
    """The CA bundle has rotated, or the job's copy is lost."""
    server = seen.status_server
    if server is None or not server.unpublished:
        return ()
    body = configmaps.status_ca(job.key.namespace, job.key.name, job.uid, server.unpublished)
    return (Create(Object.CONFIG_MAP, status_ca_name(job.key.name), body, upsert=True),)


def _after_the_end(job: JobFacts, seen: Observation, now: datetime) -> Verdict:
    """A finished job: what still runs is stopped; after its TTL the children go, never the job."""
    verdict = Verdict("", "", "")
    child = seen.child
    if child is None or child.owner_uid != job.uid or child.deleting:
        return verdict
    ttl = job.policy("ttlSecondsAfterFinished")
    age = clock.seconds_since(job.status.get("completionTime"), now) or 0.0
    if ttl is not None and age >= ttl:
        maps = (Delete(Object.CONFIG_MAP, name(job.key.name)) for name in (config_name, status_ca_name))
        return verdict.doing(delete=(*maps, *_whole(child)))
    if not (child.suspended or child.holds("Failed") or child.holds("Succeeded")) and job.holds("Failed"):
        verdict = verdict.doing(patch=(set_suspend(child, True),))
    return verdict if ttl is None else verdict.after(ttl - age)
