"""What a file for `posttrain run` holds: jobs, in order, and the ConfigMaps that their sources name.

Everything else that a file for a cluster may hold (claims, namespaces) means nothing here and is named, so that nobody
thinks it was applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_api import names

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Documents:
    """The file's documents by use; `others` are `Kind/name` of those that a local run leaves alone."""

    jobs: tuple[Manifest, ...]
    config_maps: tuple[Manifest, ...]
    others: tuple[str, ...]


def sort_documents(documents: Iterable[Manifest]) -> Documents:
    """Splits them by kind; their order is kept."""
    jobs, config_maps, others = [], [], []
    for document in documents:
        kind = document.get("kind")
        if kind == names.KIND:
            jobs.append(document)
        elif kind == "ConfigMap":
            config_maps.append(document)
        else:
            others.append(f"{kind}/{(document.get('metadata') or {}).get('name')}")
    return Documents(tuple(jobs), tuple(config_maps), tuple(others))
