"""The CustomResourceDefinition: schema, rules, columns, names. Pure; `python -m posttrain_api.crd` writes it out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from posttrain_api import names
from posttrain_api.crd.structural import structural
from posttrain_api.rules import RULES, Rule
from posttrain_api.spec import JobSpec
from posttrain_api.status import JobStatus

_COLUMNS = (
    ("Stage", "string", ".spec.stage", 0),
    ("Model", "string", ".status.model.displayName", 0),
    ("State", "string", ".status.state", 0),
    ("Progress", "string", ".status.progress.display", 0),
    ("GPUs", "integer", ".status.resources.gpus", 0),
    ("Duration", "string", ".status.duration", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Algorithm", "string", ".status.resolved.algorithm", 1),
    ("Metric", "string", ".status.progress.headline", 1),
    ("Restarts", "integer", ".status.restarts.total", 1),
    ("Reason", "string", ".status.reason", 1),
    ("Output", "string", ".status.output.uri", 1),
)
SELECTABLE = (".spec.stage", ".status.state")


def crd() -> dict[str, Any]:
    """The whole document, in plain JSON types."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.KIND.lower(),
                "shortNames": ["ptj"],
                "categories": ["posttraining"],
            },
            "versions": [_version()],
        },
    }


def _version() -> dict[str, Any]:
    return {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [_column(*column) for column in _COLUMNS],
        "selectableFields": [{"jsonPath": path} for path in SELECTABLE],
        "schema": {"openAPIV3Schema": schema()},
    }


def _column(name: str, kind: str, path: str, priority: int) -> dict[str, Any]:
    return {"name": name, "type": kind, "jsonPath": path} | ({"priority": priority} if priority else {})


def schema() -> dict[str, Any]:
    """The root schema with every rule at its node."""
    root = {
        "type": "object",
        "description": "PostTrainingJob trains one stage of a language model: it names model, data and storage, and "
        "the operator does the rest.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{names.API_VERSION}."},
            "kind": {"type": "string", "description": f"{names.KIND}."},
            "metadata": {"type": "object"},
            "spec": structural(JobSpec),
            "status": structural(JobStatus),
        },
    }
    attach(root, RULES)
    return root


def attach(root: dict[str, Any], rules: Iterable[Rule]) -> None:
    """Puts each rule on the nodes it names. KeyError where a node does not exist."""
    for rule in rules:
        for at in rule.at:
            node = _find(root, at)
            node.setdefault("x-kubernetes-validations", []).append(_validation(rule))


def _find(root: dict[str, Any], at: str) -> dict[str, Any]:
    node = root
    for part in at.split(".") if at else ():
        node = node["properties"][part.removesuffix("[]")]
        node = node["items"] if part.endswith("[]") else node
    return node


def _validation(rule: Rule) -> dict[str, Any]:
    validation = {"rule": rule.cel, "message": rule.message}
    if rule.message_expression:
        validation["messageExpression"] = rule.message_expression
    if rule.field.startswith(".metadata."):  # the API server refuses such a fieldPath: its schema of metadata is closed
        validation["message"] = f"{rule.field.removeprefix('.')} {rule.message}"
    elif rule.field:
        validation["fieldPath"] = rule.field
    if rule.forbidden:
        validation["reason"] = "FieldValueForbidden"
    return validation
