"""A PostTrainingJob as it is read: identity, parsed spec, raw status, or every reason why it cannot be read.

Called by the operator for each object it sees and by the command line for each file. An object from the API server
may be older than
today's rules, so nothing is taken for granted; all problems are reported at once. Pure: no files, no cluster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json, to_json

from posttrain_api import names
from posttrain_api.problems import InvalidJob, Problem, schema_problems, suggest
from posttrain_api.rules import CHECKED_RULES, Rule
from posttrain_api.rules.types import get, nodes
from posttrain_api.spec import JobSpec

__all__ = ["InvalidJob", "Job", "Problem", "check", "parse_job"]

_PLACES = tuple(dict.fromkeys(at for rule in CHECKED_RULES for at in rule.at))
_ROOT_FIELDS = ("apiVersion", "kind", "metadata", "spec", "status")
_META_FIELDS = (
    "name",
    "generateName",
    "namespace",
    "labels",
    "annotations",
    "finalizers",
    "ownerReferences",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "managedFields",
    "selfLink",
)


@dataclass(frozen=True)
class Job:
    """One PostTrainingJob. `uid`, `resource_version` and the times are empty or None for a job that no API server has
    seen."""

    namespace: str
    name: str
    spec: JobSpec
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    status: Mapping[str, Any] = field(default_factory=dict)

    @property
    def storage_claim(self) -> str:
        """The claim with the job's folder: one that is named, or one that is made and named like the job."""
        return self.spec.storage.claim_name or self.name


def parse_job(manifest: Mapping[str, Any]) -> Job:
    """Reads a manifest (plain JSON types). Raises InvalidJob with every problem found."""
    problems, spec = _read(manifest)
    if problems or spec is None:
        raise InvalidJob(tuple(problems))
    metadata = manifest["metadata"]
    return Job(
        namespace=metadata.get("namespace") or "default",
        name=metadata["name"],
        spec=spec,
        uid=metadata.get("uid") or "",
        generation=metadata.get("generation") or 0,
        resource_version=metadata.get("resourceVersion") or "",
        labels=metadata.get("labels") or {},
        creation_timestamp=metadata.get("creationTimestamp"),
        deletion_timestamp=metadata.get("deletionTimestamp"),
        status=manifest.get("status") or {},
    )


def check(manifest: Mapping[str, Any]) -> tuple[Problem, ...]:
    """Every problem of the manifest; none means that parse_job succeeds."""
    return tuple(_read(manifest)[0])


def _read(manifest: Mapping[str, Any]) -> tuple[list[Problem], JobSpec | None]:
    envelope = [*_kind_problems(manifest), *_unknown_problems(manifest), *_metadata_problems(manifest)]
    spec, schema = _parse_spec(manifest)
    refused = {problem.path for problem in schema}
    rules = [problem for problem in _rule_problems(manifest) if problem.path not in refused]
    return [*envelope, *schema, *rules], spec


def _kind_problems(manifest: Mapping[str, Any]) -> list[Problem]:
    wanted = {"apiVersion": names.API_VERSION, "kind": names.KIND}
    return [
        Problem(key, f"must be {value}", manifest.get(key), f"write {key}: {value}")
        for key, value in wanted.items()
        if manifest.get(key) != value
    ]


def _unknown_problems(manifest: Mapping[str, Any]) -> list[Problem]:
    """Fields of the root and of metadata that Kubernetes does not know: a strict client is refused with them."""
    metadata = manifest.get("metadata")
    places = (
        ("", manifest, _ROOT_FIELDS),
        ("metadata.", metadata if isinstance(metadata, Mapping) else {}, _META_FIELDS),
    )
    return [
        Problem(at + key, "unknown field", value, suggest(key, known))
        for at, node, known in places
        for key, value in node.items()
        if key not in known
    ]


def _metadata_problems(manifest: Mapping[str, Any]) -> list[Problem]:
    metadata = manifest.get("metadata")
    name = get(metadata, "name")
    if not isinstance(name, str) or not name:
        return [Problem("metadata.name", "is required", name, "give the job a name, e.g. my-job")]
    return []


def _parse_spec(manifest: Mapping[str, Any]) -> tuple[JobSpec | None, list[Problem]]:
    raw = manifest.get("spec")
    if raw is None:
        return None, [Problem("spec", "is required", None, "write what is trained, e.g. spec: {stage: SFT, …}")]
    try:
        return JobSpec.model_validate_json(
            to_json(_without_nulls(raw), inf_nan_mode="constants"), by_alias=True, by_name=False
        ), []
    except ValidationError as error:
        return None, schema_problems(JobSpec, "spec", error)


def _without_nulls(value: Any) -> Any:
    """As the API server does before it validates: a null is a field left out."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _rule_problems(manifest: Mapping[str, Any]) -> list[Problem]:
    plain = from_json(to_json(_without_nulls(manifest), inf_nan_mode="constants"))
    places = {at: list(nodes(plain, at)) for at in _PLACES}  # many rules look at one place
    return [problem for rule in CHECKED_RULES for problem in _broken(rule, places)]


def _broken(rule: Rule, places: Mapping[str, list[tuple[str, Any]]]) -> list[Problem]:
    if rule.holds is None:
        return []
    found = (pair for at in rule.at for pair in places[at])
    return [_blame(rule, path, node) for path, node in found if not rule.holds(node)]


def _blame(rule: Rule, path: str, node: Any) -> Problem:
    value = get(node, rule.field.lstrip(".")) if rule.field else node
    return Problem((path + rule.field).lstrip("."), rule.must, value, rule.instead)
