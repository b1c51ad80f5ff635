"""Reads YAML as kubectl reads it, and remembers the line of every field.

PyYAML alone would not do: to it `1e-5` is a text, `12:30` a number, `2024-01-01` a date and the second of two equal
keys wins. kubectl (and so
the API server) says 0.00001, "12:30", "2024-01-01" and "duplicate key". A file must mean the same everywhere.
Used by every subcommand that takes a FILE. No judgement about jobs here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

STDIN = "-"
_INT = re.compile(r"[-+]?(?:0b[01_]+|0o?[0-7_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9_]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?$")
_BOOL = re.compile(r"(?:y|Y|yes|Yes|YES|on|On|ON|true|True|TRUE|n|N|no|No|NO|off|Off|OFF|false|False|FALSE)$")
_TRUE = ("y", "yes", "on", "true")
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$")
_BIGGEST_WHOLE = 2**53


@dataclass(frozen=True)
class Document:
    """One YAML document: its value in plain JSON types, and the line (from 1) of each path."""

    value: Any
    line: int
    lines: dict[str, int] = field(default_factory=dict)

    def line_of(self, path: str) -> int:
        """Line of the path, or of the nearest thing around it that is in the file."""
        while path:
            if path in self.lines:
                return self.lines[path]
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.line


class ManifestError(ValueError):
    """A file that is no YAML, or YAML that kubectl would refuse. `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        self.line = line
        super().__init__(message)


def read_text(name: str) -> str:
    """The file's text, standard input for `-`. OSError, UnicodeDecodeError."""
    return sys.stdin.read() if name == STDIN else Path(name).read_text(encoding="utf-8")


def load_documents(text: str) -> list[Document]:
    """Every document that is not empty. ManifestError at the first fault of the YAML itself."""
    try:
        return [document for document in _documents(text) if document.value is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ManifestError(f"not valid YAML: {error.problem or error.context}", line) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ManifestError(f"not valid YAML: {error.reason} ({error.character:#04x})", line) from error


def _documents(text: str) -> Iterator[Document]:
    loader = _Loader(text)
    while loader.check_node():
        node = loader.get_node()
        assert node is not None  # check_node has said so
        lines = dict(_lines(node, ""))
        yield Document(loader.construct_document(node), node.start_mark.line + 1, lines)


def _lines(node: yaml.Node, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                raise ManifestError(f"duplicate key {name!r}; keep one of them", key.start_mark.line + 1)
            seen.add(name)
            inner = f"{path}.{name}".lstrip(".")
            yield inner, key.start_mark.line + 1
            yield from _lines(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{path}[{index}]", value.start_mark.line + 1
            yield from _lines(value, f"{path}[{index}]")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as kubectl's library resolves it."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 — PyYAML's own way


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    sign, digits = (-1 if text.startswith("-") else 1), text.lstrip("+-")
    if re.fullmatch("0[0-7]+", digits):
        return sign * int(digits, 8)
    return sign * int(digits, 0)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float | int:
    """A float; a whole one becomes an int, because JSON on the way to the API server makes no difference."""
    value = float(str(loader.construct_scalar(node)).replace("_", ""))
    return int(value) if value.is_integer() and abs(value) < _BIGGEST_WHOLE else value


def _truth(loader: _Loader, node: yaml.ScalarNode) -> bool:
    return str(loader.construct_scalar(node)).lower() in _TRUE


def _refuse_infinite(loader: _Loader, node: yaml.ScalarNode) -> None:
    raise ManifestError(
        f"{loader.construct_scalar(node)} is no number in JSON; write a finite one", node.start_mark.line + 1
    )


def _text_map(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    loader.flatten_mapping(node)
    return {_key(loader, key): loader.construct_object(value, deep=True) for key, value in node.value}


def _key(loader: _Loader, node: yaml.Node) -> str:
    value = loader.construct_object(node, deep=True)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ManifestError("a key must be a text", node.start_mark.line + 1)


def _set_up() -> None:
    numeric, letters = list("-+.0123456789"), list("yYnNtTfFoO")
    for kind, pattern, first in (
        ("bool", _BOOL, letters),
        ("int", _INT, numeric),
        ("float", _FLOAT, numeric),
        ("notfinite", _NOT_FINITE, list("-+.")),
        ("null", _NULL, ["~", "n", "N", ""]),
        ("merge", re.compile("<<$"), ["<"]),
    ):
        _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", pattern, first)
    _Loader.add_constructor("tag:yaml.org,2002:int", _whole)
    _Loader.add_constructor("tag:yaml.org,2002:float", _number)
    _Loader.add_constructor("tag:yaml.org,2002:bool", _truth)
    _Loader.add_constructor("tag:yaml.org,2002:notfinite", _refuse_infinite)
    _Loader.add_constructor("tag:yaml.org,2002:map", _text_map)


_set_up()
