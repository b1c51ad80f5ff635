"""`python -m posttrain_api.crd.reference [--check]`: writes docs/reference.md, every field of the kind as one page.

Made from the CRD itself, so the page says what `kubectl explain` says. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain_api.crd.document import crd

TARGET = Path("docs/reference.md")
HEAD = """\
# Reference

Generated from the CRD by `python -m posttrain_api.crd.reference`. `kubectl explain ptj --recursive` lists the same
fields.
"""


def render(document: Mapping[str, Any]) -> str:
    """The page of a CRD: a table for spec and one for status."""
    schema = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    parts = [HEAD]
    for block in ("spec", "status"):
        parts.append(f"## {block}\n\n| field | type | meaning |\n|---|---|---|")
        parts[-1] += "".join(f"\n{row}" for row in _rows(block, schema["properties"][block]))
    return "\n".join(parts) + "\n"


def _rows(path: str, node: Mapping[str, Any]) -> Iterator[str]:
    required = set(node.get("required", ()))
    for name, field in node.get("properties", {}).items():
        inner = f"{path}.{name}"
        mark = ", required" if name in required else ""
        yield f"| `{inner}` | {_type(field)}{mark} | {_cell(field)} |"
        yield from _rows(inner, field)
        yield from _rows(f"{inner}[]", field.get("items", {}))


def _type(field: Mapping[str, Any]) -> str:
    if field.get("x-kubernetes-int-or-string"):
        return "number or text"
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    if "additionalProperties" in field:
        return "map"
    return {"object": "block", "string": "text", "number": "number", "integer": "whole number"}.get(
        str(field.get("type")), str(field.get("type", "any"))
    )


def _cell(field: Mapping[str, Any]) -> str:
    words = str(field.get("description", ""))
    if field.get("enum"):
        words += f" One of: {', '.join(map(str, field['enum']))}."
    return " ".join(words.split()).replace("|", "\\|").replace("<", "&lt;")


def main() -> int:
    """Writes, or with --check compares; 1 where the page differs."""
    parser = argparse.ArgumentParser(prog="python -m posttrain_api.crd.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the page differs")
    text = render(crd())
    if not parser.parse_args().check:
        TARGET.write_text(text)
    elif not TARGET.is_file() or TARGET.read_text() != text:
        sys.stderr.write(f"out of date: {TARGET}; run python -m posttrain_api.crd.reference\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
