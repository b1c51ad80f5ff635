"""What a spec asks for: a plan, a refusal, or waiting for another job. Pure.

Called by the observer before a job starts, with the job's relatives: all that `fromJob` leads to, through jobs that
are not finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from posttrain_api.job import InvalidJob, Job, parse_job
from posttrain_api.reasons import Reason
from posttrain_api.records import Best, Checkpoint, Output
from posttrain_operator.backends import backend
from posttrain_operator.facts import Intent
from posttrain_operator.plan.build import build_plan
from posttrain_operator.plan.errors import PlanError
from posttrain_operator.plan.parents import ancestors, continued, dependencies, taken_at_best
from posttrain_operator.plan.types import Parent, PlanSettings
from posttrain_operator.reconcile.relatives import Family, Relative, written


def understand(manifest: Mapping[str, Any], family: Family, settings: PlanSettings) -> Intent:
    """The intent of a job. Never raises for what a user can write."""
    try:
        job = parse_job(manifest)
    except InvalidJob as error:
        return Intent(failure=Reason.INVALID_SPEC, message=_problems(error.problems))
    return _blocked(job, family) or _planned(job, family, settings)


def _problems(problems: tuple[Any, ...]) -> str:
    return "\n".join(str(problem) for problem in problems)


def _blocked(job: Job, family: Family) -> Intent | None:
    """Why no plan can be made yet, or ever: the dependencies."""
    for name in dependencies(job):
        cycle = _way(name, job.name, family)
        if cycle:
            chain = " -> ".join([job.name, *cycle])
            return Intent(
                failure=Reason.DEPENDENCY_CYCLE, message=f"the jobs wait for each other: {chain}; break the circle"
            )
    for name in dependencies(job):
        parent = family.get(name)
        if parent and parent.outcome == "Failed" and not (name in continued(job) and parent.checkpoint):
            before = " before its first checkpoint" if name in continued(job) else ""
            message = f"{name} has failed ({parent.reason}){before}; run it again under another name"
            return Intent(failure=Reason.DEPENDENCY_FAILED, message=f"{message} and name that one in fromJob")
    waits = [name for name in dependencies(job) if family.get(name) is None or not family[name].outcome]
    if not waits:
        return None
    end = "finish" if waits[0] in continued(job) else "succeed"
    return Intent(waiting=f"waits for {_chain(waits[0], family, end)}")


def _way(start: str, goal: str, family: Family) -> list[str] | None:
    """Names from `start` to `goal` along unfinished parents; None where there is no way."""
    trail: list[tuple[str, list[str]]] = [(start, [start])]
    visited: set[str] = set()
    while trail:
        name, path = trail.pop()
        if name == goal:
            return path
        relative = family.get(name)
        if name in visited or relative is None or relative.outcome:
            continue
        visited.add(name)
        trail.extend((parent, [*path, parent]) for parent in relative.parents)
    return None


def _chain(name: str, family: Family, end: str = "succeed", told: tuple[str, ...] = ()) -> str:
    """What a job waits for, in words; `end`: what that has to do. Jobs further back may wait for each other: they are
    about to fail for it."""
    relative = family.get(name)
    if relative is None:
        return f"{name}, which does not exist (yet)"
    if name in told:
        return f"{name} again: these wait for each other"
    waits = [p for p in relative.parents if family.get(p) is None or not family[p].outcome]
    return f"{name}, which waits for {_chain(waits[0], family, told=(*told, name))}" if waits else f"{name} to {end}"


def _planned(job: Job, family: Family, settings: PlanSettings) -> Intent:
    names = dependencies(job)
    parents: dict[str, Parent] = {}
    for name in names:
        parent = _parent(family[name], needs_output=name not in continued(job))
        if parent is None:
            message = f"{name} has succeeded, but its status names no output; run it again under another name"
            return Intent(failure=Reason.DEPENDENCY_FAILED, message=message)
        parents[name] = parent
    try:
        plan = build_plan(job, settings, parents)
    except PlanError as error:
        return _refused(error)
    model, said = job.spec.model.from_job, job.spec.backend or "Auto"
    kind = settings.backend if said == "Auto" else said
    refusal = backend(kind).refusal(plan)
    if refusal:
        return Intent(failure=Reason.INVALID_SPEC, message=refusal)
    return Intent(
        plan=plan,
        backend=kind,
        lineage=_lineage(job, family),
        display_name=model.name if model else "",
        parents=written(family, names),
    )


def _refused(error: PlanError) -> Intent:
    if error.reason is Reason.WAITING_FOR_DEPENDENCY:
        return Intent(waiting=_problems(error.problems))
    return Intent(failure=error.reason, message=_problems(error.problems))


def _parent(relative: Relative, needs_output: bool) -> Parent | None:
    try:
        output = Output.model_validate(relative.output) if needs_output or relative.output else None
        checkpoint = Checkpoint.model_validate(relative.checkpoint) if relative.checkpoint else None
        best = Best.model_validate(relative.best) if relative.best else None
    except ValidationError:  # an older status, or one without an output: its reader is told by the caller
        return None
    return Parent(relative.name, relative.uid, relative.stage, output, checkpoint, best, relative.resolved)


def _lineage(job: Job, family: Family) -> tuple[Mapping[str, Any], ...]:
    """The parents' own lineage, then the parents; each job once, oldest first. A reference is no ancestor, a reward
    model is; of a best model no digest is known."""
    entries: dict[str, Mapping[str, Any]] = {}
    best = taken_at_best(job)
    for name in ancestors(job):
        relative = family[name]
        own = {"job": name, "uid": relative.uid, "stage": relative.stage}
        digest = None if name in best else (relative.output or {}).get("digest")
        for entry in (*relative.lineage, {**own, **({"outputDigest": digest} if digest else {})}):
            entries.setdefault(str(entry.get("uid")), entry)
    return tuple(entries.values())[-64:]
