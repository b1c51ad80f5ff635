"""Before there is a child: is the spec understood, may it start, is everything there, then make it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from posttrain_api.reasons import Reason
from posttrain_operator.actions import Create, Delete, Object
from posttrain_operator.backends import backend, configmaps
from posttrain_operator.backends.owned import config_name, status_ca_name
from posttrain_operator.facts import Intent, JobFacts, Missing, Observation
from posttrain_operator.plan.types import Plan
from posttrain_operator.reconcile import claims, deadlines, stalls
from posttrain_operator.status.verdict import Verdict, failed, stalled, starting, suspended


def refused(seen: Observation) -> Verdict | None:
    """A spec that can never run."""
    intent = seen.intent
    return failed(intent.failure, intent.message) if intent.failure else None


def intake(job: JobFacts, seen: Observation, now: datetime) -> Verdict:
    """The verdict on a job without a child; the spec is not refused."""
    held = _held(job, seen.intent)
    if held:
        return held
    late = deadlines.startup(job, now)
    if late:
        return late
    missing = _obstacle(job, seen) or next(iter(seen.missing), None) or _denied(seen)
    if missing:
        return stalled(missing.reason, missing.message).after(seen.timing.retry)
    if _predecessor(job, seen):
        message = f"waits until what an earlier job named {job.key.name} left behind is deleted"
        return starting("Pending", "CleaningUp", message).after(seen.timing.settle)
    return _start(job, seen) if seen.intent.plan else _unknown(seen)


def _unknown(seen: Observation) -> Verdict:
    return starting("Pending", "Observing", "the job has not been read yet").after(seen.timing.retry)


def _held(job: JobFacts, intent: Intent) -> Verdict | None:
    if intent.waiting:
        return suspended(Reason.WAITING_FOR_DEPENDENCY, intent.waiting)
    if job.suspend:
        return suspended(Reason.USER_SUSPENDED, "spec.suspend is true; set it to false to start")
    return None


def _obstacle(job: JobFacts, seen: Observation) -> Missing | None:
    if not seen.backend_available:
        its = backend(seen.backend)
        message = f"the cluster has no {its.KIND} kind ({its.API_VERSION}); install {its.INSTALL}"
        return Missing(Reason.BACKEND_MISSING, message)
    for found in (seen.obstacle, seen.config):
        if found and found.owner_uid != job.uid and not _left_behind(job, seen):
            message = f"a {found.what} exists and is not this job's; delete it or rename the job"
            return Missing(Reason.NAME_CONFLICT, message)
    return claims.obstacle(job, seen)


def _left_behind(job: JobFacts, seen: Observation) -> bool:
    """Whether what has our name is an earlier job's, on its way out: being deleted already, or ours by its mark and of
    another job, which the garbage collector takes."""
    found = [each for each in (seen.obstacle, seen.config) if each is not None]
    return any(each.deleting or (each.spec_hash and each.owner_uid not in (None, job.uid)) for each in found)


def _predecessor(job: JobFacts, seen: Observation) -> bool:
    return seen.foreign_pods or _left_behind(job, seen) or claims.leaving(job, seen)


def _denied(seen: Observation) -> Missing | None:
    """The API server refused the child or its configuration: a quota, a policy or a webhook that is away may change, so
    it is tried again."""
    if seen.refusal is None:
        return None
    reason = stalls.refusal_reason(seen.refusal.message)
    if seen.refusal.kind == Object.CLAIM and reason is Reason.UNSCHEDULABLE:
        reason = Reason.STORAGE_NOT_FOUND
    known = reason is not Reason.UNSCHEDULABLE
    message = f"the API server refused the {seen.refusal.kind} ({seen.refusal.status}): {seen.refusal.message}"
    return Missing(reason if known else Reason.BACKEND_MISSING, message)


def _start(job: JobFacts, seen: Observation) -> Verdict:
    plan = seen.intent.plan
    assert plan is not None
    begun = starting("Pending", "Starting", f"the {seen.backend} is being created")
    config = seen.config
    if config and config.spec_hash != plan.spec_hash:
        stale = Delete(Object.CONFIG_MAP, config_name(job.key.name), config.uid)
        return _silently(begun.doing(delete=(stale,)))
    return _silently(begun.doing(create=_children(plan, seen, with_config=config is None)))


def _silently(verdict: Verdict) -> Verdict:
    """The next pass follows at once and knows the child's uid: one status write instead of two."""
    return Verdict(**{**verdict.__dict__, "silent": True, "requeue_after": 0.0})


def _children(plan: Plan, seen: Observation, with_config: bool) -> tuple[Create, ...]:
    """The configuration first: a pod that finds it missing would wait for the kubelet's next try."""
    job = plan.config.job
    config = configmaps.config_map(plan, seen.intent.parents)
    made = [*claims.creation(plan, seen)]
    made += [Create(Object.CONFIG_MAP, config_name(job.name), config)] if with_config else []
    server = seen.status_server
    if server and server.unpublished:
        body = configmaps.status_ca(job.namespace, job.name, job.uid, server.unpublished)
        made.append(Create(Object.CONFIG_MAP, status_ca_name(job.name), body, upsert=True))
    its, endpoint = backend(seen.backend), server.endpoint if server else None
    made += [_creation(body) for body in (*its.before(plan, endpoint), its.build(plan, endpoint))]
    return tuple(made)


def _creation(body: Mapping[str, Any]) -> Create:
    return Create(Object(body["kind"]), body["metadata"]["name"], body)
