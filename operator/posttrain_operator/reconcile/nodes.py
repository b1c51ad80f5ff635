"""Nodes that are lost, and what becomes of a job's pods on them. Pure.

A pod on a node that has stopped answering neither runs nor goes: its deletion waits for a kubelet that is away. Nodes
are not watched; one is looked at when a pod on it behaves strangely (the node controller takes its Ready away). One
that has not been ready for a while is lost: the pod is deleted without grace and its successor placed elsewhere. What
its processes still write, should they live on, is fenced by the number of the attempt on the storage.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from posttrain_api.reasons import Budget, Reason
from posttrain_operator import clock
from posttrain_operator.actions import Delete, Object
from posttrain_operator.facts import Observation
from posttrain_operator.reconcile.attempt import AttemptView
from posttrain_operator.reconcile.causes import Cause
from posttrain_operator.reconcile.ends import replica
from posttrain_operator.records import PodRecord


def suspicious(pod: PodRecord, now: datetime) -> bool:
    """Whether its node should be looked at: it runs and is not ready, or its grace is over and it is still there."""
    if pod.ended or pod.node is None or pod.waiting is not None:
        return False
    overdue = clock.seconds_since(pod.deleting_since, now)
    return (pod.phase == "Running" and not pod.ready) or (overdue is not None and overdue >= 0)


def is_lost(pod: PodRecord, seen: Observation, now: datetime) -> bool:
    """Whether it can be given up: its node has not been ready for long enough. Of a node that is gone nobody knows
    since when, so the pod's own signs count."""
    if pod.ended or pod.node is None or pod.node not in seen.unready_nodes:
        return False
    silent = seen.unready_nodes[pod.node] or pod.deleting_since or pod.ready_since or pod.created
    return (clock.seconds_since(silent, now) or 0.0) >= seen.timing.lost_node


def next_look(view: AttemptView, seen: Observation, now: datetime) -> float | None:
    """Seconds until a suspicious pod's node is looked at again; None where there is none."""
    if not any(suspicious(pod, now) or pod.deleting_since for pod in view.live):
        return None
    ages = (clock.seconds_since(since, now) for since in seen.unready_nodes.values())
    waits = [seen.timing.lost_node - age for age in ages if age is not None and age < seen.timing.lost_node]
    return min([seen.timing.retry, *waits])


def loss(pods: Iterable[PodRecord], seen: Observation, now: datetime) -> Cause | None:
    """The loss of a node with one of these pods as the cause of a restart; it is nobody's fault and free."""
    pod = next((pod for pod in pods if is_lost(pod, seen, now)), None)
    if pod is None:
        return None
    since = seen.unready_nodes[pod.node or ""]
    state = f"has not been ready since {since}" if since else "is gone"
    message = f"node {pod.node} {state}; what ran there goes on elsewhere"
    failure = {"reason": Reason.NODE_LOST, "message": message, "replica": replica(pod), "node": pod.node}
    return Cause(failure, f"{replica(pod)}: {message}", Budget.FREE)


def stuck(view: AttemptView, seen: Observation, now: datetime) -> tuple[Delete, ...]:
    """Pods that cannot end because their node is lost, their grace being over: deleted without grace."""
    over = (pod for pod in view.live if (clock.seconds_since(pod.deleting_since, now) or -1) >= 0)
    return tuple(Delete(Object.POD, pod.name, pod.uid, 0) for pod in over if is_lost(pod, seen, now))
