"""What `posttrain validate` says beyond the rules: about a file as a whole, and advice that is no error.

Pure: documents in, findings out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from posttrain_api import names
from posttrain_api.job import Job
from posttrain_api.records import Best, Checkpoint, Output
from posttrain_cli.manifests import Document
from posttrain_operator.plan.build import build_plan
from posttrain_operator.plan.errors import PlanError
from posttrain_operator.plan.parents import dependencies
from posttrain_operator.plan.types import Parent, PlanSettings

UNKNOWN_UID = "uid"
_NEVER = "1970-01-01T00:00:00Z"

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """A line of the file and what is wrong or remarkable there. Notes never count, warnings under --strict only."""

    line: int
    text: str
    level: Level = "error"


def with_uid(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a stand-in for the uid that the API server would give, so that paths can be shown."""
    metadata = manifest.get("metadata")
    if not isinstance(metadata, dict):
        return dict(manifest)
    return {**manifest, "metadata": {"uid": UNKNOWN_UID, **metadata}}


def placeholder_parents(job: Job, known: Mapping[str, Job]) -> dict[str, Parent]:
    """Stand-ins for the finished parents: of the same file where they are there, otherwise what the job hopes for on a
    claim of their name."""
    return {name: _known(known[name], known) if name in known else _hoped(name, job) for name in dependencies(job)}


def _known(job: Job, known: Mapping[str, Job]) -> Parent:
    merged = bool(job.spec.output and job.spec.output.merge_adapter)
    adapter = (job.spec.lora is not None or job.spec.tuning == "LoRA") and not merged
    kept = bool(job.spec.evaluation and job.spec.evaluation.keep_best)
    rest = {name: other for name, other in known.items() if name != job.name}  # so that a circle comes to an end
    parent = _parent(job.name, job.storage_claim, adapter=adapter, kept=kept)
    return replace(parent, stage=job.spec.stage, resolved=_resolved(job, rest) if adapter else {})


def _resolved(job: Job, known: Mapping[str, Job]) -> Mapping[str, Any]:
    try:
        return build_plan(job, PlanSettings(trainer_image=""), placeholder_parents(job, known)).resolved
    except PlanError:  # said where that job is checked
        return {}


def _hoped(name: str, job: Job) -> Parent:
    continues = bool(job.spec.lora and job.spec.lora.continue_adapter)
    parent = _parent(name, f"storage-of-{name}", adapter=continues, kept=True)
    scores = job.spec.stage if job.spec.stage == "RewardModel" else ""
    return replace(parent, stage=scores, resolved={"model": {"uri": f"pvc://storage-of-{name}/base"}})


def _parent(name: str, claim: str, *, adapter: bool, kept: bool) -> Parent:
    folder = f"pvc://{claim}/{names.run_path(name, UNKNOWN_UID)}"
    output = Output(
        uri=f"{folder}/{names.OUTPUT_DIR}", digest="sha256:", format="peft" if adapter else "safetensors", size_bytes=0
    )
    checkpoint = Checkpoint(
        step=0, time=_NEVER, uri=f"{folder}/{names.CHECKPOINTS_DIR}/last", size_bytes=0, digest="sha256:"
    )
    best = Best(step=0, metric="eval_loss", value=0.0, uri=f"{folder}/{names.BEST_DIR}") if kept else None
    return Parent(name, UNKNOWN_UID, "", output, checkpoint, best)


def job_findings(document: Document, job: Job) -> tuple[Finding, ...]:
    """Advice about one valid job."""
    found = []
    if job.status:
        line = document.line_of("status")
        found.append(
            Finding(line, "status: is written by the operator; the API server drops it from a file", "warning")
        )
    for path, uri in _models(job):
        if uri is not None and uri.startswith("hf://") and "@" not in uri:
            text = f"{path}: {uri} names no revision; every new job takes what it means that day"
            found.append(Finding(document.line_of(path), f"{text}; add @<commit> to repeat a run", "note"))
    return tuple(found)


def _models(job: Job) -> Iterator[tuple[str, str | None]]:
    """Path and URI of every model that the job reads."""
    spec, critic = job.spec, job.spec.critic
    yield "spec.model.uri", spec.model.uri
    yield "spec.reference.uri", spec.reference.uri if spec.reference else None
    for index, reward in enumerate(spec.rewards or ()):
        yield f"spec.rewards[{index}].model.uri", reward.model.uri if reward.model else None
    yield "spec.critic.model.uri", critic.model.uri if critic and critic.model else None


def file_findings(documents: Sequence[Document]) -> list[Finding]:
    """About the file: no job in it, other kinds, two jobs of one name, jobs that wait for each other."""
    jobs = [document for document in documents if _kind(document) == names.KIND]
    if not jobs:
        return [Finding(1, f"no {names.KIND} in it; write kind: {names.KIND}")]
    others = (document for document in documents if _kind(document) != names.KIND)
    skipped = (
        Finding(document.line, f"{_kind(document) or 'no kind'}: not a {names.KIND}, not checked", "note")
        for document in others
    )
    return [*skipped, *_doubles(jobs), *_cycles(jobs)]


def _kind(document: Document) -> str:
    return str(document.value.get("kind", "")) if isinstance(document.value, dict) else ""


def _name(document: Document) -> tuple[str, str]:
    metadata = document.value.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    return str(metadata.get("namespace") or "default"), str(metadata.get("name") or "")


def _doubles(jobs: Iterable[Document]) -> Iterable[Finding]:
    first: dict[tuple[str, str], int] = {}
    for document in jobs:
        key = _name(document)
        if key in first and key[1]:
            text = f"metadata.name: {key[1]} is also the job of line {first[key]}; the later would replace the earlier"
            yield Finding(document.line_of("metadata.name"), text)
        first.setdefault(key, document.line)


def _cycles(jobs: Sequence[Document]) -> Iterable[Finding]:
    parents = {_name(document): _parents(document) for document in jobs}
    for document in jobs:
        name = _name(document)
        if name not in parents[name] and _reaches(name, name, parents, set()):
            text = f"fromJob: {name[1]} waits, in the end, for itself; break the circle"
            yield Finding(document.line_of("spec.model.fromJob"), text)


def _parents(document: Document) -> list[tuple[str, str]]:
    namespace = _name(document)[0]
    return [(namespace, name) for name in _from_jobs(document.value.get("spec"))]


def _from_jobs(node: Any) -> Iterator[str]:
    """Every `fromJob.name` anywhere in a spec, which need not be valid."""
    if isinstance(node, dict):
        named = node.get("fromJob")
        if isinstance(named, dict) and isinstance(named.get("name"), str):
            yield named["name"]
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for value in values:
        yield from _from_jobs(value)


def _reaches(
    start: tuple[str, str],
    goal: tuple[str, str],
    parents: Mapping[tuple[str, str], Sequence[tuple[str, str]]],
    seen: set[tuple[str, str]],
) -> bool:
    for parent in parents.get(start, ()):
        if parent == goal:
            return True
        if parent not in seen:
            seen.add(parent)
            if _reaches(parent, goal, parents, seen):
                return True
    return False
