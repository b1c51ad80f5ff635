"""From a pydantic model to a structural schema, as a CRD needs it.

JSON Schema as pydantic writes it is not allowed in a CRD: references are inlined, nullable unions collapse to "may be
left out", and
what Kubernetes does not know is dropped. A construct that cannot be said is an error here, never a weaker schema. Pure.
"""

from __future__ import annotations

from typing import Any

from posttrain_api.base import Model

_KEPT = (
    "description",
    "type",
    "format",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "required",
    "x-kubernetes-int-or-string",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-preserve-unknown-fields",
)


class SchemaError(ValueError):
    """A model that no structural schema can express; the message names the path."""


def structural(model: type[Model]) -> dict[str, Any]:
    """The model's structural schema: every node typed, every string, list and map bounded, no references."""
    document = model.model_json_schema(by_alias=True, mode="validation")
    return _node(document, document.get("$defs", {}), model.__name__)


def _node(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> dict[str, Any]:
    schema = _merge(schema, definitions, path)
    if schema.get("x-kubernetes-int-or-string"):
        return _int_or_string(schema)
    node = {key: schema[key] for key in _KEPT if key in schema}
    _bounds(node, schema)
    if "const" in schema:
        node["enum"] = [schema["const"]]
    _check(node, path)
    return node | _children(schema, definitions, path)


def _merge(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> dict[str, Any]:
    """Resolves references and optional unions; words said at the place of use win over the definition's."""
    if "$ref" in schema:
        target = definitions[schema["$ref"].rsplit("/", 1)[1]]
        return _merge({**target, **{key: value for key, value in schema.items() if key != "$ref"}}, definitions, path)
    if "anyOf" not in schema or schema.get("x-kubernetes-int-or-string"):
        return schema
    members = [member for member in schema["anyOf"] if member.get("type") != "null"]
    if len(members) != 1:
        raise SchemaError(f"{path}: a union of {len(members)} types has no structural schema; make it one type")
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    return _merge({**members[0], **rest}, definitions, path)


def _int_or_string(schema: dict[str, Any]) -> dict[str, Any]:
    kept = ("description", "enum", "pattern", "minimum", "maxLength", "x-kubernetes-int-or-string")
    return {key: schema[key] for key in kept if key in schema} | {"anyOf": [{"type": "integer"}, {"type": "string"}]}


def _bounds(node: dict[str, Any], schema: dict[str, Any]) -> None:
    """OpenAPI 3.0's way: the exclusive bound is a flag beside the bound."""
    for exclusive, plain in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in schema:
            node |= {plain: schema[exclusive], exclusive: True}
    if node.get("type") == "integer":
        node.setdefault("format", "int64")
    if schema.get("default") is not None:
        node["default"] = schema["default"]


def _check(node: dict[str, Any], path: str) -> None:
    kind = node.get("type")
    if kind is None:
        raise SchemaError(f"{path}: has no type")
    if kind == "string" and "maxLength" not in node and "enum" not in node:
        raise SchemaError(f"{path}: a text without maxLength; every text has a bound")
    if kind == "array" and "maxItems" not in node:
        raise SchemaError(f"{path}: a list without maxItems; every list has a bound")


def _children(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> dict[str, Any]:
    if schema["type"] == "array":
        listing = "map" if "x-kubernetes-list-map-keys" in schema else "atomic"
        return {"items": _node(schema["items"], definitions, f"{path}[]"), "x-kubernetes-list-type": listing}
    if schema["type"] != "object":
        return {}
    values = schema.get("additionalProperties")
    if isinstance(values, dict):
        if "maxProperties" not in schema:
            raise SchemaError(f"{path}: a map without maxProperties; every map has a bound")
        return {"additionalProperties": _node(values, definitions, f"{path}.*")}
    return {
        "properties": {
            name: _node(child, definitions, f"{path}.{name}") for name, child in schema.get("properties", {}).items()
        }
    }
