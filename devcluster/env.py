"""A container's environment variables, as a kubelet builds them. Pure: the ConfigMaps and Secrets come as arguments.

Order is the rule: the image's variables, then the `kubernetes` service's, then envFrom, then env; later ones win, and
`$(VAR)` sees those before it.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from devcluster.fields import expand, field_value, resource_value

Obj = dict[str, Any]
Ref = tuple[str, str]


class ConfigError(Exception):
    """The pod names a ConfigMap, Secret or key that is not there: CreateContainerConfigError."""


@dataclass(frozen=True)
class Sources:
    """What variables may refer to: `objects` maps (kind, name) to the object or None, kind `configmap` or `secret`."""

    pod: Obj
    addresses: Mapping[str, str]
    objects: Mapping[Ref, Obj | None]


def object_data(kind: str, obj: Obj) -> dict[str, bytes]:
    """The keys and values of a ConfigMap or Secret."""
    coded = {key: base64.b64decode(value) for key, value in (obj.get("binaryData") or {}).items()}
    if kind == "secret":
        return {key: base64.b64decode(value) for key, value in (obj.get("data") or {}).items()}
    return coded | {key: str(value).encode() for key, value in (obj.get("data") or {}).items()}


def references(container: Obj) -> set[Ref]:
    """The ConfigMaps and Secrets that the container's variables name."""
    found: set[Ref] = set()
    for source in container.get("envFrom") or []:
        for field, kind in (("configMapRef", "configmap"), ("secretRef", "secret")):
            if field in source:
                found.add((kind, source[field]["name"]))
    for each in container.get("env") or []:
        for field, kind in (("configMapKeyRef", "configmap"), ("secretKeyRef", "secret")):
            ref = (each.get("valueFrom") or {}).get(field)
            if ref:
                found.add((kind, ref["name"]))
    return found


def _lookup(sources: Sources, kind: str, ref: Obj) -> dict[str, bytes] | None:
    obj = sources.objects.get((kind, ref["name"]))
    if obj is not None:
        return object_data(kind, obj)
    if ref.get("optional"):
        return None
    raise ConfigError(f'{kind} "{ref["name"]}" not found')


def _from_key(sources: Sources, kind: str, ref: Obj) -> str | None:
    data = _lookup(sources, kind, ref)
    if data is None:
        return None
    if ref["key"] in data:
        return data[ref["key"]].decode(errors="replace")
    if ref.get("optional"):
        return None
    namespace = sources.pod["metadata"]["namespace"]
    noun = "ConfigMap" if kind == "configmap" else "Secret"
    raise ConfigError(f"couldn't find key {ref['key']} in {noun} {namespace}/{ref['name']}")


def _value_from(sources: Sources, container: Obj, source: Obj) -> str | None:
    if "fieldRef" in source:
        return field_value(sources.pod, source["fieldRef"]["fieldPath"], sources.addresses)
    if "resourceFieldRef" in source:
        return resource_value(sources.pod, source["resourceFieldRef"], container["name"])
    if "configMapKeyRef" in source:
        return _from_key(sources, "configmap", source["configMapKeyRef"])
    if "secretKeyRef" in source:
        return _from_key(sources, "secret", source["secretKeyRef"])
    raise ConfigError(f"env valueFrom with {sorted(source)} is not supported by devcluster")


def _from_objects(sources: Sources, container: Obj) -> dict[str, str]:
    values: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        for field, kind in (("configMapRef", "configmap"), ("secretRef", "secret")):
            data = _lookup(sources, kind, source[field]) if field in source else None
            prefix = source.get("prefix") or ""
            values |= {prefix + key: value.decode(errors="replace") for key, value in (data or {}).items()}
    return values


def build(container: Obj, sources: Sources, base: Mapping[str, str]) -> dict[str, str]:
    """All variables; `base` are the image's and the service's. Raises ConfigError for a missing object or key."""
    values = {**base, **_from_objects(sources, container)}
    for each in container.get("env") or []:
        if each.get("valueFrom"):
            value = _value_from(sources, container, each["valueFrom"])
        else:
            value = expand(str(each.get("value") or ""), values)
        if value is not None:
            values[each["name"]] = value
    return values
