"""Rollouts of a real engine on 1 and 2 ranks at every ZeRO stage: the same samples, and an update that knows nothing of
them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rollout_jobs
from trainer_kit import run_ranks

DROPOUT = ["0-full-dropout", "1-adapter-dropout", "2-full-dropout", "3-adapter-dropout"]
STEADY = ["0-full", "3-full"]
"""Without dropout, whose numbers depend on the rank, the later weights are the same on any number of ranks too."""
BF16 = ["3-full-bf16"]
RANKS = (1, 2)
Found = Callable[[int], dict[str, Any]]
"""What was found on a number of ranks: by cell, and `turns`."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    @functools.cache
    def run(ranks: int) -> dict[str, Any]:
        folder = Path(tmp_path_factory.mktemp(f"ranks-{ranks}"))
        run_ranks(rollout_jobs.cells, (str(folder), [*DROPOUT, *STEADY, *BF16]), ranks, folder)
        return dict(json.loads((folder / "found.json").read_text()))

    return run


def cells(found: Found, ranks: int) -> dict[str, Any]:
    return {name: cell for name, cell in found(ranks).items() if name != "turns"}


@pytest.mark.parametrize("ranks", RANKS)
def test_an_update_is_bit_equal_with_rollouts_before_it(found: Found, ranks: int) -> None:
    """Dropout draws from the generators that the library seeds anew, and needs the mode that it switches off."""
    assert [name for name, cell in cells(found, ranks).items() if not cell["equal"]] == []


@pytest.mark.parametrize("ranks", RANKS)
def test_log_probabilities_are_the_engines_after_every_update(found: Found, ranks: int) -> None:
    for name, cell in cells(found, ranks).items():
        tolerance = 0.06 if "bf16" in name else 1e-4
        assert max(rollout["difference"] for rollout in cell["rollouts"]) < tolerance, name


def tokens(found: Found, ranks: int, name: str, rollout: int) -> Any:
    return found(ranks)[name]["rollouts"][rollout]["tokens"]


def test_both_engines_draw_the_same(found: Found) -> None:
    for ranks in RANKS:
        for name in [*DROPOUT, *STEADY]:
            for first in (0, 2, 4):
                assert tokens(found, ranks, name, first) == tokens(found, ranks, name, first + 1), (ranks, name, first)


def test_samples_do_not_depend_on_ranks_or_stage(found: Found) -> None:
    first = {
        tuning: {str(tokens(found, ranks, name, 0)) for ranks in RANKS for name in DROPOUT + STEADY if tuning in name}
        for tuning in ("full", "adapter")
    }
    assert [len(each) for each in first.values()] == [1, 1]
    assert first["full"] != first["adapter"]
    later = {str([tokens(found, ranks, name, rollout) for rollout in (2, 4)]) for ranks in RANKS for name in STEADY}
    assert len(later) == 1


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_take_as_many_turns_and_stop_together(found: Found, ranks: int) -> None:
    """Also a rank without requests: it takes turns as long as another one is busy, and may be the one that stops."""
    for engine in ("Generate", "ContinuousBatching"):
        assert [each[f"{engine}-5"] for each in found(ranks)["turns"]] == [[None, 5]] * ranks
        samples, turns = zip(*(each[f"{engine}-0"] for each in found(ranks)["turns"]), strict=True)
        assert samples == (3, 0)[:ranks]
        assert len(set(turns)) == 1
        assert turns[0] > 25
