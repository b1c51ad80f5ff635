"""A job whose pods are alive and whose training stands still: first its stacks, then a gang restart. Pure.

Judged on the trainer's own words: a report says how long ago the loop last got on, so what counts is the span between
two times of `status.progress` and no clock of ours. Without fresh reports there is no verdict: a status server that is
away restarts nothing (the pods' launchers have a later limit of their own). The decision to ask for stacks is
`status.attempt.stalledTime`: every replica of the status server reads it there and asks the pods with each answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from posttrain_api import names
from posttrain_api.reasons import Budget, Reason
from posttrain_api.records import MAX_LOG_TAIL_BYTES, MAX_STACKS
from posttrain_operator import clock
from posttrain_operator.facts import JobFacts, Observation
from posttrain_operator.reconcile.attempt import AttemptView
from posttrain_operator.reconcile.causes import Cause
from posttrain_operator.reconcile.ends import replica
from posttrain_operator.reconcile.restarts import restart
from posttrain_operator.status.conditions import Condition
from posttrain_operator.status.verdict import Verdict, running

IN_THE_LOOP = frozenset({"Training", "Evaluating", "Saving", "Exporting"})
"""Phases in which the loop is expected to get on. Before it: startupDeadlineSeconds."""
CANNOT = "cannot answer: "
"""How the trainer says that a rank wrote no stacks."""
_MAX_MESSAGE = 1000


def hanging(job: JobFacts, seen: Observation, view: AttemptView, now: datetime) -> Verdict | None:
    """Asks for stacks, waits for them, then restarts; None where the job gets on or nobody knows."""
    idle = idle_seconds(job, seen, now)
    if idle is None or idle < job.stall_seconds:
        return None
    waited = clock.seconds_since(job.stalled_since, now)
    if waited is None:
        return _asked(job, seen, now)
    if waited < seen.timing.stacks and _silent(job):
        return _standing(job).after(seen.timing.stacks - waited)
    return restart(job, view, cause(job, view, idle), now)


def recovered(job: JobFacts, verdict: Verdict) -> Verdict:
    """The stacks of a job that gets on again, or that nobody hears of, are asked for no longer."""
    if job.stalled_since is None or "attempt" in verdict.changes:
        return verdict
    return verdict.having(attempt={key: value for key, value in job.status["attempt"].items() if key != "stalledTime"})


def idle_seconds(job: JobFacts, seen: Observation, now: datetime) -> float | None:
    """How long the present attempt had stood still when it last reported; None where there is nothing to judge."""
    progress, begun = job.progress, clock.parse((job.status.get("attempt") or {}).get("startTime"))
    heard, advanced = (clock.parse(progress.get(field)) for field in ("lastUpdateTime", "lastAdvanceTime"))
    if begun is None or heard is None or advanced is None:
        return None
    if not job.holds("Running") or progress.get("phase") not in IN_THE_LOOP:
        return None
    if (now - heard).total_seconds() > seen.timing.fresh:
        return None
    return (heard - max(advanced, begun)).total_seconds()


def _asked(job: JobFacts, seen: Observation, now: datetime) -> Verdict:
    verdict = _standing(job).after(seen.timing.stacks)
    return verdict.having(attempt={**job.status["attempt"], "stalledTime": clock.render(now)})


def _standing(job: JobFacts) -> Verdict:
    advanced = clock.parse(job.progress.get("lastAdvanceTime"))
    since = f" since {clock.render(advanced)}" if advanced else ""
    message = f"training stands still{since}; the stacks of its ranks are collected, then all pods are restarted"
    verdict = running("its pods run and training stands still")
    return replace(
        verdict, conditions={**verdict.conditions, "TrainingHealthy": Condition("False", Reason.NO_PROGRESS, message)}
    )


def cause(job: JobFacts, view: AttemptView, idle: float) -> Cause:
    """What the restart is for, in the words of a person who is woken by it."""
    progress, places, silent = job.progress, _places(job), _silent(job)
    place = f"in phase {progress.get('phase')} at step {progress.get('step', 0)}"
    head = f"training stood still for {idle:.0f} s (runPolicy.stallSeconds {job.stall_seconds}) {place}"
    lines = [f"{_ranks(ranks)}: {where}" for where, ranks in places.items()]
    lines += [f"{_ranks(silent)}: no stacks came"] if silent else []
    uri = ((job.status.get("resolved") or {}).get("storage") or {}).get("uri")
    kept = f". Stacks: {uri}/{names.STACKS_DIR}/" if uri else ""
    rank = suspect(places, silent)
    failure = {
        "reason": Reason.HANG,
        "message": f"{head}; {'; '.join(lines)}"[: _MAX_MESSAGE - len(kept)] + kept,
        **({} if rank is None else _seat(job, view, rank)),
        "rank": rank,
        "step": progress.get("step"),
        "logTail": "\n".join(lines).encode()[:MAX_LOG_TAIL_BYTES].decode(errors="ignore"),
    }
    told = f"{head}; {lines[0]}"
    return Cause({name: value for name, value in failure.items() if value is not None}, told, Budget.HANG)


def suspect(places: Mapping[str, Sequence[int]], silent: Sequence[int]) -> int | None:
    """The rank that the others wait for, where one stands out: the only one that sends nothing or cannot answer, else
    the only one of three or more that is at another place than the others."""
    mute = [*silent, *(rank for where, ranks in places.items() if where.startswith(CANNOT) for rank in ranks)]
    if mute:
        return mute[0] if len(mute) == 1 else None
    alone = [ranks[0] for ranks in places.values() if len(ranks) == 1]
    others = sum(map(len, places.values())) - len(alone)
    return alone[0] if len(alone) == 1 and others > 1 else None


def _places(job: JobFacts) -> dict[str, list[int]]:
    """Where → the ranks there: those that cannot answer first, then the fewest."""
    places: dict[str, list[int]] = defaultdict(list)
    for stack in job.progress.get("stacks") or ():
        places[str(stack["where"])].append(int(stack["rank"]))
    return dict(sorted(places.items(), key=lambda item: (not item[0].startswith(CANNOT), len(item[1]), item[1])))


def _silent(job: JobFacts) -> list[int]:
    """Ranks whose stacks have not come, of those that are shown."""
    said = {int(stack["rank"]) for stack in job.progress.get("stacks") or ()}
    nodes, per_node = _shape(job)
    return [rank for rank in range(nodes * per_node) if rank not in said][: max(0, MAX_STACKS - len(said))]


def _shape(job: JobFacts) -> tuple[int, int]:
    """Nodes, and ranks of each."""
    found = (job.status.get("resolved") or {}).get("resources") or {}
    return int(found.get("nodes", 1)), int(found.get("processesPerNode", 1))


def _seat(job: JobFacts, view: AttemptView, rank: int) -> dict[str, str | None]:
    """The rank's pod, and the node that it is on."""
    number = rank // _shape(job)[1]
    name = "master-0" if number == 0 else f"worker-{number - 1}"
    return {"replica": name, "node": next((pod.node for pod in view.live if replica(pod) == name), None)}


def _ranks(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' if len(runs) > 1 or runs[0][0] != runs[0][1] else ''} {text}"
