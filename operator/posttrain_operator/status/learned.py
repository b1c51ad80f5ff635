"""What the status shows besides the verdict: effective values, sizes, lineage, and what the trainer reported.

Reports arrive in `status.progress`, which the status server writes; the facts in them are copied here under our own
manager, because progress is the present and these stay. The success record has the last word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from posttrain_api.records import Resolved, Success
from posttrain_operator.facts import Intent, JobFacts
from posttrain_operator.plan.resolved import settle
from posttrain_operator.plan.types import Plan


def planned(job: JobFacts, intent: Intent) -> dict[str, Any]:
    """From a plan: resolved, resources, model, lineage. Nothing where there is no plan (any more)."""
    plan = intent.plan
    if plan is None:
        return {}
    topology = plan.config.topology
    facts: dict[str, Any] = {
        "resolved": dict(plan.resolved),
        "resources": {"gpus": topology.nodes * topology.gpus_per_node, "pods": topology.nodes},
        "model": {"displayName": intent.display_name or display_name(plan)},
    }
    return {**facts, "lineage": list(intent.lineage)} if intent.lineage else facts


def display_name(plan: Plan) -> str:
    """`Qwen2.5-7B-Instruct` of its URI, `Llama (scratch)` of a new model."""
    model = plan.config.model
    if model.scratch:
        return f"{model.scratch.family} (scratch)"
    uri = model.source.uri if model.source else ""
    return uri.rstrip("/").rpartition("/")[2].partition("@")[0][:63]


def reported(status: Mapping[str, Any], progress: Mapping[str, Any]) -> dict[str, Any]:
    """From the trainer's reports: checkpoints, dataReport, settled values. `status` is what is known so far."""
    facts: dict[str, Any] = {}
    if known := _checkpoints(status, progress.get("checkpoint"), progress.get("best")):
        facts["checkpoints"] = known
    if report := progress.get("dataReport"):
        facts["dataReport"] = report
    if resolved := _resolved(progress.get("resolved")):
        facts |= _settled(status, resolved)
    return facts


def succeeded(status: Mapping[str, Any], success: Success) -> dict[str, Any]:
    """From rank 0's success record: output, last checkpoint, dataReport, settled values; no failure remains."""
    facts: dict[str, Any] = {"output": success.output.to_wire(), "failure": None}
    last, best = (each.to_wire() if each else None for each in (success.checkpoint, success.best))
    if known := _checkpoints(status, last, best):
        facts["checkpoints"] = known
    if success.data_report:
        facts["dataReport"] = success.data_report.to_wire()
    if success.resolved:
        facts |= _settled(status, success.resolved)
    return facts


def _checkpoints(
    status: Mapping[str, Any], last: Mapping[str, Any] | None, best: Mapping[str, Any] | None
) -> dict[str, Any]:
    """With what was told: nothing of either, and what is known stays. The two are told together, so that a last one
    without a best says that the best is lost: its checkpoint was damaged, and no later evaluation has given another."""
    known = dict(status.get("checkpoints") or {})
    if last:
        same = (known.get("last") or {}).get("digest") == last.get("digest")
        known |= {"last": dict(last), "count": int(known.get("count", 0)) + (0 if same else 1)}
        known.pop("best", None)
    return {**known, "best": dict(best)} if best else known


def _settled(status: Mapping[str, Any], resolved: Resolved) -> dict[str, Any]:
    revision = {"resolvedRevision": resolved.revision} if resolved.revision else {}
    return {
        "resolved": settle(status.get("resolved") or {}, resolved),
        "model": {**(status.get("model") or {}), **revision},
    }


def _resolved(raw: Any) -> Resolved | None:
    try:
        return Resolved.model_validate(raw) if raw else None
    except ValidationError:  # written by another version of the status server: shown there, not taken over
        return None
