"""The generated CRD as a document: complete words, bounds everywhere, no drift, and errors for what cannot be said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import Field

from posttrain_api import names
from posttrain_api.base import Model
from posttrain_api.crd import crd
from posttrain_api.crd.__main__ import TARGETS, render
from posttrain_api.crd.document import SELECTABLE, attach, schema
from posttrain_api.crd.structural import SchemaError, structural
from posttrain_api.rules import Rule

REPOSITORY = Path(__file__).parents[2]
FORBIDDEN = {
    "$ref",
    "$defs",
    "definitions",
    "title",
    "examples",
    "nullable",
    "oneOf",
    "allOf",
    "patternProperties",
    "const",
    "x-example",
}


def walk(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from walk(child, f"{path}.{name}")
    for key, mark in (("items", "[]"), ("additionalProperties", ".*")):
        if key in node:
            yield from walk(node[key], path + mark)


NODES = list(walk(schema()))
FIELDS = [
    (path, node) for path, node in NODES if path.startswith((".spec.", ".status.")) and not path.endswith(("[]", ".*"))
]


def test_every_field_has_words_and_an_example() -> None:
    assert len(FIELDS) > 200
    for path, node in FIELDS:
        words = node.get("description", "")
        assert len(words) > 15, path
        assert "Example: " in words, path
        assert words.endswith("."), path


def test_numbers_say_unit_or_range() -> None:
    for path, node in FIELDS:
        if path.startswith(".spec.") and node.get("type") in ("integer", "number"):
            assert "Unit: " in node["description"] or "Range: " in node["description"], path


def test_optional_spec_scalars_say_their_default() -> None:
    """Blocks of fields have none of their own; whether a thing is asked for at all needs none."""
    asked = {".uri", ".subset"}
    for path, node in FIELDS:
        parent = dict(NODES)[path.rpartition(".")[0]]
        scalar = node.get("type") != "object" and not path.endswith(tuple(asked))
        if path.startswith(".spec.") and scalar and path.rpartition(".")[2] not in parent.get("required", []):
            assert "Default: " in node["description"], path


def test_everything_is_bounded() -> None:
    for path, node in NODES:
        if not path.startswith((".spec", ".status")):
            continue
        if node.get("type") == "string":
            assert "maxLength" in node or "enum" in node, path
        if node.get("type") == "array":
            assert "maxItems" in node, path
        if "additionalProperties" in node:
            assert "maxProperties" in node, path


def test_only_what_a_structural_schema_knows() -> None:
    for path, node in NODES:
        assert not FORBIDDEN & node.keys(), path
        assert "type" in node or node.get("x-kubernetes-int-or-string"), path
        assert "pattern" not in node or "(?!" not in node["pattern"], path


def test_suspend_is_the_only_schema_default() -> None:
    assert {path: node["default"] for path, node in NODES if "default" in node} == {".spec.suspend": False}


def test_names_and_columns() -> None:
    spec = crd()["spec"]
    assert spec["names"]["shortNames"] == ["ptj"]
    assert spec["names"]["categories"] == ["posttraining"]
    (version,) = spec["versions"]
    assert version["subresources"] == {"status": {}}, "no scale: it would change the world size of a running job"
    known = {path for path, _ in NODES}
    paths = [column["jsonPath"] for column in version["additionalPrinterColumns"]] + list(SELECTABLE)
    assert {path for path in paths if path not in known} == {".metadata.creationTimestamp"}


def test_copies_are_up_to_date() -> None:
    for target in TARGETS:
        assert (REPOSITORY / target).read_text() == render(), f"{target}: run python -m posttrain_api.crd"
    assert yaml.safe_load(render()) == crd()


def test_command_checks_and_writes(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "posttrain_api.crd", *arguments],
            cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    missing = command("--check")
    assert missing.returncode == 1
    assert "run python -m posttrain_api.crd" in missing.stderr
    assert command().returncode == 0
    assert command("--check").returncode == 0
    (tmp_path / TARGETS[0]).write_text("other")
    stale = command("--check")
    assert stale.returncode == 1
    assert str(TARGETS[0]) in stale.stderr
    assert str(TARGETS[1]) not in stale.stderr


def test_no_host_words() -> None:
    assert not re.search(r"/root|/home/|localhost", render())
    assert names.GROUP in render()


class Unbounded(Model):
    text: str


class Endless(Model):
    items: tuple[int, ...]


class Loose(Model):
    table: dict[str, int]


class Either(Model):
    value: Annotated[str, Field(max_length=3)] | int


class Anything(Model):
    value: Any


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Unbounded, "Unbounded.text: a text without maxLength"),
        (Endless, "Endless.items: a list without maxItems"),
        (Loose, "Loose.table: a map without maxProperties"),
        (Either, "Either.value: a union of 2 types"),
        (Anything, "Anything.value: has no type"),
    ],
)
def test_what_cannot_be_said_is_an_error(model: type[Model], words: str) -> None:
    with pytest.raises(SchemaError, match=re.escape(words)):
        structural(model)


def test_a_rule_at_no_node_is_an_error() -> None:
    with pytest.raises(KeyError):
        attach(schema(), [Rule(at=("spec.nowhere",), cel="true", must="x", instead="y")])
