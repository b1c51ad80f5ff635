"""What the engine must do that no whole training shows: parameters without a gradient, random numbers of the ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trainer_kit import call, run_ranks


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_parameter_without_gradient_stays(tmp_path: Path, zero: int) -> None:
    """As an expert that no token is sent to. ZeRO-3 would apply the last step's gradient once more."""
    run_ranks(call, ("unused_in_a_step", zero, str(tmp_path / "kept")), 1, tmp_path)
    (first, second), (first_later, second_later) = json.loads((tmp_path / "kept").read_text())
    assert first == second == [0.5, 0.5, 0.5, 0.5]
    assert first_later == [-0.5, 0.0, 0.0, 0.0]
    assert second_later == second


def test_ranks_draw_different_numbers(tmp_path: Path) -> None:
    """Else dropout would be alike on all."""
    run_ranks(call, ("draw", 5, str(tmp_path)), 2, tmp_path)
    assert (tmp_path / "drawn-0").read_text() != (tmp_path / "drawn-1").read_text()
