"""The law of the trainer: the same global batch gives the same update, however it is cut, sharded or spread.

Ranks × ZeRO stages × micro-batch splits × full or LoRA, in fp32 under SGD without clipping (Adam and clipping hide
a wrong scale of the loss), each against plain torch on the whole batch at once: loss and gradient norm to 1e-6, the
update to 1e-5 of its length. A few cells clip: to the same length at every stage, whoever does it. A few train with
what jobs train with: AdamW, its decay on matrices only, a schedule. Packed: test_invariance_packed.py.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from invariance_kit import SPLITS, compare, plain, runs_of

GRID = [f"{tuning}-z{zero}-{split}" for tuning, zero, split in product(("Full", "LoRA"), range(4), SPLITS)]
CHUNKED = [
    f"{tuning}-z{zero}-cut-chunked"
    for tuning, zero in (("Full", 0), ("Full", 3), ("LoRA", 2), ("Tied", 3), ("Tied", 2))
]
CLIPPED = [f"Clipped-z{zero}-cut" for zero in range(4)]
ADAMW = [f"AdamW-z{zero}-cut" for zero in range(4)]
NAMES = [*GRID, *CHUNKED, *CLIPPED, *ADAMW, "Tied-z0-whole", "Tied-z3-single"]


runs = runs_of(NAMES)


@pytest.fixture(scope="module")
def references(runs: Path) -> dict[str, Any]:
    return {kind: plain(runs, kind) for kind in ("Full", "LoRA", "Tied", "Clipped", "AdamW")}


@pytest.mark.parametrize("name", NAMES)
def test_update_depends_on_the_global_batch_only(runs: Path, references: dict[str, Any], name: str) -> None:
    compare(runs / name, references[name.split("-")[0]])
