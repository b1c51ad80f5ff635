"""Python rewards whose file is a ConfigMap of the same YAML: that it is there, is Python, and has the function.

Called by `posttrain validate`. The file is parsed and never run. Pure: documents in, findings out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from posttrain_api.job import Job
from posttrain_api.spec.rewards import REWARD_FILE, PythonReward
from posttrain_cli.findings import Finding
from posttrain_cli.manifests import Document

_WHERE = "spec.rewards[{}].python"


def script_findings(documents: Sequence[Document], jobs: Iterable[tuple[Document, Job]]) -> list[Finding]:
    """What is wrong with the scripts. A ConfigMap that the file does not hold is the cluster's business."""
    scripts = {_key(document.value): document for document in documents if _is_config_map(document.value)}
    return [
        finding
        for document, job in jobs
        for index, python in _pythons(job)
        if (script := scripts.get((job.namespace, python.config_map_ref.name)))
        for finding in _about(document, _WHERE.format(index), python, script)
    ]


def _is_config_map(value: Any) -> bool:
    return isinstance(value, dict) and value.get("kind") == "ConfigMap" and isinstance(value.get("metadata"), dict)


def _key(value: Mapping[str, Any]) -> tuple[str, str]:
    metadata = value["metadata"]
    return str(metadata.get("namespace") or "default"), str(metadata.get("name"))


def _pythons(job: Job) -> Iterator[tuple[int, PythonReward]]:
    for index, reward in enumerate(job.spec.rewards or ()):
        if reward.python:
            yield index, reward.python


def _about(document: Document, path: str, python: PythonReward, script: Document) -> Iterator[Finding]:
    key = python.config_map_ref.key or REWARD_FILE
    data = script.value.get("data")
    text = data.get(key) if isinstance(data, dict) else None
    if not isinstance(text, str):
        rule = f"{path}.configMapRef.key: ConfigMap {python.config_map_ref.name} has no text at {key}"
        yield Finding(document.line_of(f"{path}.configMapRef"), f"{rule}; name a key of its data")
        return
    line = script.line_of(f"data.{key}")
    try:
        names = _functions(ast.parse(text))
    except (SyntaxError, ValueError) as error:
        at = getattr(error, "lineno", None) or 0
        yield Finding(line + at, f"{key} of ConfigMap {python.config_map_ref.name} is no Python: {error}; correct it")
        return
    if python.function not in names:
        known = f"it has {', '.join(sorted(names))}" if names else "it has none"
        rule = f"{path}.function: {key} has no function {python.function} ({known})"
        yield Finding(document.line_of(f"{path}.function"), f"{rule}; correct the name")


def _functions(module: ast.Module) -> set[str]:
    """Names at the top of the file that may be a function: defined, imported or assigned there."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    return names
