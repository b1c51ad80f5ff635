"""The reference page is the CRD's, and says something about every field."""

from __future__ import annotations

import re
from pathlib import Path

from posttrain_api.crd.document import crd
from posttrain_api.crd.reference import render

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(crd()), "run python -m posttrain_api.crd.reference"


def test_every_field_is_explained() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| (.*) \|$", render(crd()), re.MULTILINE)
    assert len(rows) > 100
    assert [path for path, _, meaning in rows if len(meaning) < 5] == []
