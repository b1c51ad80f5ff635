"""The small languages inside a pod spec: field references, resource references and `$(VAR)`. Pure.

Used for environment variables and for downward API files; rules as in the API reference, no more and no less than a
kubelet honours.
"""

import re
from collections.abc import Mapping
from typing import Any

Obj = dict[str, Any]

_INDEXED = re.compile(r"^metadata\.(labels|annotations)\['([^']+)'\]$")
_VARIABLE = re.compile(r"\$\$|\$\(([^)]*)\)")
_QUANTITY = re.compile(r"^([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)(m|Ki|Mi|Gi|Ti|Pi|Ei|k|M|G|T|P|E)?$")
_SCALE = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_SCALE |= {unit: 1024.0**power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)}


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity as a number; raises ValueError for what is none."""
    match = _QUANTITY.match(str(text))
    if not match:
        raise ValueError(f"quantity {text!r}: expected a number with an optional unit such as m, Ki, Mi, G")
    return float(match.group(1)) * _SCALE[match.group(2) or ""]


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace `$(NAME)` by its value; an unknown name stays as written, `$$` becomes `$`."""

    def one(match: re.Match[str]) -> str:
        name = match.group(1)
        if name is None:
            return "$"
        return values.get(name, match.group(0))

    return _VARIABLE.sub(one, text)


def _pairs(values: Mapping[str, str]) -> str:
    escaped = {
        key: value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for key, value in values.items()
    }
    return "\n".join(f'{key}="{escaped[key]}"' for key in sorted(escaped))


def field_value(pod: Obj, path: str, addresses: Mapping[str, str]) -> str:
    """The value of a `fieldRef`; `addresses` holds status.podIP and status.hostIP. Raises ValueError for others."""
    meta, spec = pod["metadata"], pod["spec"]
    indexed = _INDEXED.match(path)
    if indexed:
        return str((meta.get(indexed.group(1)) or {}).get(indexed.group(2), ""))
    if path in ("metadata.labels", "metadata.annotations"):
        return _pairs(meta.get(path.removeprefix("metadata.")) or {})
    if path in ("metadata.name", "metadata.namespace", "metadata.uid"):
        return str(meta[path.removeprefix("metadata.")])
    if path in ("spec.nodeName", "spec.serviceAccountName"):
        return str(spec.get(path.removeprefix("spec."), ""))
    plain = path[:-1] if path in ("status.podIPs", "status.hostIPs") else path
    if plain in addresses:
        return addresses[plain]
    raise ValueError(f"fieldPath {path!r} is not supported")


def resource_value(pod: Obj, ref: Obj, container: str) -> str:
    """The value of a `resourceFieldRef`, rounded up to whole divisors; `container` is its default container."""
    kind, _, name = str(ref["resource"]).partition(".")
    wanted = ref.get("containerName") or container
    spec = next(each for each in pod["spec"]["containers"] if each["name"] == wanted)
    resources = spec.get("resources") or {}
    value = (resources.get(kind) or {}).get(name) or (resources.get("limits") or {}).get(name) or "0"
    divisor = quantity(ref.get("divisor") or "1") or 1.0
    amount = quantity(value) / divisor
    return str(int(amount) if amount == int(amount) else int(amount) + 1)
