"""The law of the trainer for packed micro-batches: ranks × ZeRO stages × splits × full or LoRA, as in
test_invariance.py, and against the same plain torch, which sees one sequence at a time."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from invariance_kit import SPLITS, compare, plain, runs_of

NAMES = [f"{tuning}-z{zero}-{split}-packed" for tuning, zero, split in product(("Full", "LoRA"), range(4), SPLITS)]


runs = runs_of(NAMES)


@pytest.fixture(scope="module")
def references(runs: Path) -> dict[str, Any]:
    return {kind: plain(runs, kind) for kind in ("Full", "LoRA")}


@pytest.mark.parametrize("name", NAMES)
def test_packed_is_as_good(runs: Path, references: dict[str, Any], name: str) -> None:
    compare(runs / name, references[name.split("-")[0]])
