"""Every reason has a page that says its effect truly and names a fix that exists."""

from __future__ import annotations

import re
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from posttrain_api.reasons import REASONS, Reason
from posttrain_api.spec import JobSpec

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "reasons"
COMMAND = re.compile(r"\b(kubectl|posttrain) [a-z]+")


def page(reason: Reason) -> str:
    return (PAGES / f"{reason}.md").read_text()


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (\w+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))


def spec_fields(model: type[BaseModel] = JobSpec, prefix: str = "spec") -> set[str]:
    found = {prefix}
    for name, field in model.model_fields.items():
        path = f"{prefix}.{field.alias or name}"
        found.add(path)
        for inner in models_of(field.annotation):
            found |= spec_fields(inner, path)
    return found


def models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (None, str) and not isinstance(annotation, UnionType):
        return []
    return [
        model
        for inner in get_args(annotation)
        if get_origin(annotation) is not Union or inner
        for model in models_of(inner)
    ]


@pytest.mark.parametrize("reason", list(Reason), ids=str)
def test_each_reason_has_cause_check_and_fix(reason: Reason) -> None:
    parts = sections(page(reason))
    assert list(parts) == ["Cause", "Check", "Fix"]
    assert all(len(part) > 20 for part in parts.values())
    assert COMMAND.search(parts["Check"]), "Check must show a command"


@pytest.mark.parametrize("reason", list(Reason), ids=str)
def test_each_page_says_the_effect_and_exit_code_of_the_table(reason: Reason) -> None:
    head = page(reason).split("## Cause")[0]
    info = REASONS[reason]
    assert head.startswith(f"# {reason}\n")
    assert f"Effect: **{info.effect}**" in head
    assert (f"Exit code of the trainer: {info.exit_code}." in head) == (info.exit_code is not None)


@pytest.mark.parametrize("reason", list(Reason), ids=str)
def test_each_fix_names_a_field_or_a_command(reason: Reason) -> None:
    fix = sections(page(reason))["Fix"]
    assert COMMAND.search(fix) or "`spec." in fix


@pytest.mark.parametrize("reason", list(Reason), ids=str)
def test_every_field_that_a_page_names_exists(reason: Reason) -> None:
    named = {match.replace("[]", "") for match in re.findall(r"`(spec\.[\w.\[\]]+)", page(reason))}
    assert named <= spec_fields(), f"not in the API: {named - spec_fields()}"


def test_every_chart_value_that_a_page_names_exists() -> None:
    values = yaml.safe_load((ROOT / "helm" / "posttrain-operator" / "values.yaml").read_text())
    for reason in Reason:
        for dotted in re.findall(r"chart value\s+`([\w.]+)`", page(reason)):
            node = values
            for key in dotted.split("."):
                assert key in node, f"{reason}.md names {dotted}, which is not in values.yaml"
                node = node[key]


def test_the_list_of_reasons_is_the_table() -> None:
    rows = re.findall(
        r"^\| \[(\w+)\]\(\w+\.md\) \| (\w+) \| (\d*) \|$", (PAGES / "README.md").read_text(), re.MULTILINE
    )
    expected = [
        (str(r), str(REASONS[r].effect), "" if REASONS[r].exit_code is None else str(REASONS[r].exit_code))
        for r in Reason
    ]
    assert rows == expected


def test_no_page_is_left_over() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} - {"README"} == {str(reason) for reason in Reason}
