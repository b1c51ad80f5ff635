"""Every stage at the edges of its data: one row for two ranks, an epoch shorter than a batch, a step in which nothing
is counted. The same numbers on one rank without sharding as on two with it, and none of them is NaN."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_kit import call, make_config, make_model, make_reward_model, pairs, prepare, rows, run_ranks

STAGES = ("SFT", "Preference", "RewardModel")
CASES = ("one-row", "short-epoch", "nothing-counted")
NAMES = [f"{stage}-{case}" for stage, case in product(STAGES, CASES)]


def _data(stage: str, case: str) -> list[Any]:
    count = {"one-row": 1, "short-epoch": 3, "nothing-counted": 4}[case]
    if stage == "SFT":
        made: list[Any] = rows(count, seed=3)
        return [(tokens, [0] * len(mask)) for tokens, mask in made] if case == "nothing-counted" else made
    made = pairs(count, seed=3)
    if case == "nothing-counted":
        made = [tuple((tokens, [0] * len(mask)) for tokens, mask in pair) for pair in made]
    return made


def _make(root: Path, name: str, zero: int) -> None:
    stage, case = name.split("-", 1)
    (root / name).mkdir()
    changes = {"algorithm": "DPO", "preference__sft_weight": 0.5} if stage == "Preference" else {}
    config = make_config(
        root / name,
        stage=stage,
        zero_stage=zero,
        training__max_steps=2,
        training__batch_size={"one-row": 1, "short-epoch": 8, "nothing-counted": 4}[case],
        training__schedule="Constant",
        training__warmup_steps=0,
        **changes,
    )
    model = root / ("reward" if stage == "RewardModel" else "model")
    data = _data(stage, case)
    prepare(config, data, data, model_dir=str(model), tokenizer_dir=str(model))
    (root / name / "max_logits").write_text(str(2**26))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    roots = {}
    for ranks, zero in ((1, 0), (2, 3)):
        root = tmp_path_factory.mktemp(f"ranks{ranks}")
        make_model(root / "model")
        make_reward_model(root / "reward")
        for name in NAMES:
            _make(root, name, zero)
        run_ranks(call, ("cells", str(root), NAMES, str(root / "done")), ranks, root)
        roots[ranks] = root
    return roots


def _lines(root: Path, name: str) -> list[dict[str, float]]:
    lines = json.loads((root / name / "lines.json").read_text())
    return [{key: value for key, value in line.items() if "time" not in key and "per_second" not in key
             and "bytes" not in key} for line in lines]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one(runs: dict[int, Path], name: str) -> None:
    alone, shared = (_lines(runs[ranks], name) for ranks in (1, 2))
    assert len(alone) == len(shared) == 2
    for one, other in zip(alone, shared, strict=True):
        assert one == pytest.approx(other, rel=2e-5, abs=2e-6)
        assert all(math.isfinite(value) for value in one.values())


@pytest.mark.parametrize("stage", ["SFT", "Preference"])
def test_nothing_counted_is_nothing_learned(runs: dict[int, Path], stage: str) -> None:
    """Σ w = 0: the loss is 0, or log 2 for a pair of which nothing is known; the gradient is zero."""
    expected = math.log(2) if stage == "Preference" else 0.0
    lines = _lines(runs[2], f"{stage}-nothing-counted")
    for line in lines:
        assert line["loss"] == pytest.approx(expected, abs=1e-7)
        assert line["grad_norm"] == 0.0
    assert lines[-1]["eval_loss"] == pytest.approx(expected, abs=1e-7)


def test_an_epoch_shorter_than_a_batch_repeats_rows(runs: dict[int, Path]) -> None:
    """Eight rows a step from a set of three; the epoch says how often."""
    first, second = _lines(runs[2], "SFT-short-epoch")
    assert (first["epoch"], second["epoch"]) == (pytest.approx(8 / 3), pytest.approx(16 / 3))
    assert torch.load(runs[2] / "SFT-short-epoch" / "weights.pt")
