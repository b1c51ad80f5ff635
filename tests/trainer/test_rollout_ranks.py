"""Rollouts of a real engine on 1 and 2 ranks at every ZeRO stage: the same samples, and an update that knows nothing of
them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import rollout_jobs
from trainer_kit import run_ranks

DROPOUT = ["0-full-dropout", "1-adapter-dropout", "2-full-dropout", "3-full-dropout", "3-adapter-dropout"]
STEADY = ["0-full", "3-full", "2-adapter"]
"""Without dropout, whose numbers depend on the rank, the later weights are the same on any number of ranks too."""
BF16 = ["3-full-bf16"]
RANKS = (1, 2)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    results = {}
    for ranks in RANKS:
        folder = Path(tmp_path_factory.mktemp(f"ranks-{ranks}"))
        run_ranks(rollout_jobs.cells, (str(folder), [*DROPOUT, *STEADY, *BF16]), ranks, folder)
        results[ranks] = json.loads((folder / "found.json").read_text())
    return results


@pytest.mark.parametrize("ranks", RANKS)
def test_an_update_is_bit_equal_with_rollouts_before_it(found: dict[int, Any], ranks: int) -> None:
    """Dropout draws from the generators that the library seeds anew, and needs the mode that it switches off."""
    assert {name: cell["equal"] for name, cell in found[ranks].items()} == dict.fromkeys(found[ranks], True)


@pytest.mark.parametrize("ranks", RANKS)
def test_log_probabilities_are_the_engines_after_every_update(found: dict[int, Any], ranks: int) -> None:
    for name, cell in found[ranks].items():
        tolerance = 0.06 if "bf16" in name else 1e-4
        assert max(rollout["difference"] for rollout in cell["rollouts"]) < tolerance, name


def tokens(found: dict[int, Any], ranks: int, name: str, rollout: int) -> Any:
    return found[ranks][name]["rollouts"][rollout]["tokens"]


def test_both_engines_draw_the_same(found: dict[int, Any]) -> None:
    for ranks in RANKS:
        for name in [*DROPOUT, *STEADY]:
            for first in (0, 2, 4):
                assert tokens(found, ranks, name, first) == tokens(found, ranks, name, first + 1), (ranks, name, first)


def test_samples_do_not_depend_on_ranks_or_stage(found: dict[int, Any]) -> None:
    for tuning in ("full", "adapter"):
        begin = {
            json.dumps(tokens(found, ranks, name, 0)) for ranks in RANKS for name in DROPOUT + STEADY if tuning in name
        }
        assert len(begin) == 1
        later = {
            json.dumps([tokens(found, ranks, name, rollout) for rollout in (2, 4)])
            for ranks in RANKS
            for name in STEADY
            if tuning in name
        }
        assert len(later) == 1
    assert tokens(found, 1, "0-full", 0) != tokens(found, 1, "2-adapter", 0)
