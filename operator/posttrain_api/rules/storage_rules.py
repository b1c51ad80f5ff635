"""What spec.storage says: a claim that is there, or one that is made, and which nodes can share it."""

from __future__ import annotations

from typing import Any

from posttrain_api.rules.types import Rule, excludes, get, has, one_of, whole


def _shared(spec: Any) -> bool:
    nodes = whole(spec, "resources.nodes", 1)
    return nodes is None or nodes < 2 or get(spec, "storage.accessMode") != "ReadWriteOnce"


def _only_with_size(field: str) -> Rule:
    return excludes(
        "spec.storage",
        f".{field}",
        f"has(self.{field}) && !has(self.size)",
        lambda storage: has(storage, field) and not has(storage, "size"),
        ("goes with size and only with it", "remove it: a claim that is there has its own"),
    )


STORAGE_RULES: tuple[Rule, ...] = (
    one_of("spec.storage", ("claimName", "size"), "name a claim that is there, or give the size of one to be made"),
    *(_only_with_size(field) for field in ("storageClassName", "accessMode", "retain")),
    Rule(
        at=("spec",),
        cel="!has(self.resources) || !has(self.resources.nodes) || self.resources.nodes < 2 || "
        "!has(self.storage.accessMode) || self.storage.accessMode != 'ReadWriteOnce'",
        must="must be ReadWriteMany for several nodes",
        instead="write ReadWriteMany, with a storage class that gives it, or take one node",
        field=".storage.accessMode",
        holds=_shared,
    ),
)
