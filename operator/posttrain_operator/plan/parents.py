"""Which earlier jobs a spec names, where, and for what. Pure; asked before there is a plan, and by it."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain_api.job import Job
from posttrain_api.spec import JobSpec
from posttrain_api.spec.references import JobRef, ModelJobRef

_REFERENCE = "spec.reference.fromJob"
_CHECKPOINT = "spec.checkpoint.from.fromJob"


def references(spec: JobSpec) -> Iterator[tuple[str, JobRef]]:
    """(path, reference) of every `fromJob`, in the spec's order."""
    start = spec.checkpoint.from_ if spec.checkpoint else None
    critic = spec.critic.model if spec.critic else None
    found: list[tuple[str, JobRef | None]] = [
        ("spec.model.fromJob", spec.model.from_job),
        (_REFERENCE, spec.reference.from_job if spec.reference else None),
        (_CHECKPOINT, start.from_job if start else None),
        *(
            (f"spec.rewards[{index}].model.fromJob", reward.model.from_job if reward.model else None)
            for index, reward in enumerate(spec.rewards or ())
        ),
        ("spec.critic.model.fromJob", critic.from_job if critic else None),
    ]
    yield from ((path, reference) for path, reference in found if reference)


def dependencies(job: Job) -> tuple[str, ...]:
    """Names of the jobs that must be finished first, each once, in the spec's order; but for those that are `continued`
    they must have succeeded."""
    return tuple(dict.fromkeys(reference.name for _, reference in references(job.spec)))


def continued(job: Job) -> frozenset[str]:
    """Of the dependencies those of which nothing but a checkpoint is taken: they must be finished, and may have
    failed."""
    found = [(path, reference.name) for path, reference in references(job.spec)]
    wholly = {name for path, name in found if path != _CHECKPOINT}
    return frozenset(name for path, name in found if path == _CHECKPOINT and name not in wholly)


def ancestors(job: Job) -> tuple[str, ...]:
    """Of the dependencies those that the model has learned from: all but the reference."""
    return tuple(dict.fromkeys(found.name for path, found in references(job.spec) if path != _REFERENCE))


def taken_at_best(job: Job) -> frozenset[str]:
    """Of the ancestors those whose best model is taken and not their output."""
    taken = [found for path, found in references(job.spec) if path != _REFERENCE]
    best = {found.name for found in taken if isinstance(found, ModelJobRef) and found.checkpoint == "Best"}
    return frozenset(best - {found.name for found in taken if _output(found)})


def _output(found: JobRef) -> bool:
    return isinstance(found, ModelJobRef) and found.checkpoint != "Best"
