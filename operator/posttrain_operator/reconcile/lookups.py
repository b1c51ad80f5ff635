"""What the observer has to look up, because it is not watched. Pure; asked before each pass.

Nothing on the way of a healthy job: its claim once before it starts, Events only when pods are missing or hang, its
pods only when their child has ended and the watch has not said how.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from posttrain_operator import clock
from posttrain_operator.facts import Intent, JobFacts, Observation
from posttrain_operator.reconcile import claims as storage
from posttrain_operator.reconcile import nodes
from posttrain_operator.reconcile.attempt import AttemptView
from posttrain_operator.records import ConditionRecord, PodRecord


@dataclass(frozen=True)
class Lookups:
    """Names of claims and ConfigMaps that must exist; uids whose warning Events are wanted; nodes that may be lost;
    whether the job's pods are."""

    claims: tuple[str, ...] = ()
    own_claim: str | None = None
    """Name of the claim that the job makes."""
    unbound: tuple[str, ...] = ()
    """Names of claims that pods wait for."""
    config_maps: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    pods: bool = False


def needs_plan(job: JobFacts, has_child: bool) -> bool:
    """Whether the spec must be understood: before the job is known to have started, and when its child is gone."""
    return not job.terminal and (not has_child or not job.has_started)


def before_start(job: JobFacts, intent: Intent, has_child: bool) -> Lookups:
    """The claims and ConfigMaps of a job that is about to start."""
    if has_child or job.suspend or job.terminal or intent.plan is None:
        return Lookups()
    plan = intent.plan
    own = plan.storage_claim if plan.new_claim else None
    claims = tuple(sorted({plan.storage_claim, *plan.claims} - {own}))
    return Lookups(claims=claims, config_maps=tuple(sorted(set(plan.config_maps))), own_claim=own)


def while_running(job: JobFacts, seen: Observation, now: datetime) -> Lookups:
    """Events of a child whose pods are missing and of pods that hang before their start; nodes of pods that do not
    go."""
    child = seen.child
    if child is None or job.terminal:
        return Lookups()
    view = AttemptView.of(job, seen)
    late = (clock.seconds_since(child.created, now) or 0) >= seen.timing.missing_pods
    missing = late and not child.suspended and len(view.live) < view.size and not _over(seen)
    hanging = [pod for pod in view.live if _hangs(pod, seen, now)][:8]
    strange = tuple(sorted({pod.node for pod in view.live if pod.node and nodes.suspicious(pod, now)}))
    events = ((child.uid,) if missing else ()) + tuple(pod.uid for pod in hanging)
    unbound = (storage.name_of(job),) if any(storage.waited_for(pod) for pod in view.live) else ()
    return Lookups(events=events, nodes=strange, pods=_unexplained(seen, view, now), unbound=unbound)


def _over(seen: Observation) -> bool:
    return bool(_verdicts(seen))


def _unexplained(seen: Observation, view: AttemptView, now: datetime) -> bool:
    """A child that ended a while ago without a pod that did: a watch may stand still for minutes, and a success must
    not be called a failure for it."""
    since = [found.since for found in _verdicts(seen)]
    late = any((clock.seconds_since(moment, now) or 0) >= seen.timing.settle / 2 for moment in since)
    return late and not any(pod.ended and pod.role == "Master" for pod in view.pods)


def _verdicts(seen: Observation) -> list[ConditionRecord]:
    conditions = seen.child.conditions if seen.child else {}
    return [found for name, found in conditions.items() if name in ("Succeeded", "Failed") and found.status == "True"]


def _hangs(pod: PodRecord, seen: Observation, now: datetime) -> bool:
    waits = pod.phase == "Pending" and pod.node is not None and pod.waiting is None and not pod.mounted
    return waits and (clock.seconds_since(pod.created, now) or 0) >= seen.timing.mount
