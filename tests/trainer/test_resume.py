"""Six steps are three, kill -9, and three more: the same weights to the bit and the same lines in metrics.jsonl.

With dropout, so that the random state matters, and with evaluation in between, so that it must not. Cases are
chosen pairwise over tuning, ZeRO stage and ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer_kit import Shape, exported, make_config, make_model, prepare, rows, start_worker, steady_lines, succeed

from posttrain_trainer.checkpoint_files import committed
from posttrain_trainer.metrics import read_metrics

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.2, "target_modules": ["all-linear"]}
CASES = [
    ("Full", 0, 1),
    ("Full", 1, 2),
    ("Full", 2, 2),
    ("Full", 3, 1),
    ("Full", 3, 2),
    ("LoRA", 0, 2),
    ("LoRA", 2, 1),
    ("LoRA", 3, 2),
]


def _job(run_dir: Path, tuning: str, zero: int, ranks: int, keep: int = 2) -> Any:
    config = make_config(
        run_dir,
        tuning=tuning,
        **({"lora": LORA} if tuning == "LoRA" else {}),
        zero_stage=zero,
        evaluation__every_steps=2,
        checkpoint__every_steps=3,
        checkpoint__keep_last=keep,
        topology__processes_per_node=ranks,
    )
    make_model(run_dir / "model", Shape(attention_dropout=0.2))
    prepare(config, rows(25), rows(9, seed=1))
    return config


@pytest.mark.parametrize(("tuning", "zero", "ranks"), CASES)
def test_killed_and_resumed_is_bit_equal(tmp_path: Path, tuning: str, zero: int, ranks: int) -> None:
    whole = _job(tmp_path / "whole", tuning, zero, ranks)
    expected = succeed(whole, ranks)
    broken = _job(tmp_path / "broken", tuning, zero, ranks)
    codes = start_worker(broken, ranks, 1, ("die_after_line", 5)).wait()
    assert codes[0] == -9
    assert codes[1:] == [160] * (ranks - 1)  # PeerLost
    assert [line["step"] for line in read_metrics(tmp_path / "broken" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    found = succeed(broken, ranks, 2)
    assert "resumed from" in (tmp_path / "broken" / "logs-2" / "rank-0.log").read_text()
    assert exported(broken) == exported(whole)
    assert steady_lines(broken) == steady_lines(whole)
    if tuning == "Full":  # an adapter names the folder of its base, which differs here
        assert found["output"]["digest"] == expected["output"]["digest"]
    assert found["step"] == 6


@pytest.mark.parametrize(
    ("place", "step", "zero", "ranks", "left"),
    [
        ("DeepSpeed", 3, 2, 2, []),
        ("manifest", 6, 3, 1, [3]),
        ("commit", 6, 2, 2, [6, 3]),
        ("removal", 3, 0, 1, [6]),  # keepLast 1: step 6 is committed, then step 3 goes
    ],
)
def test_killed_inside_a_save(tmp_path: Path, place: str, step: int, zero: int, ranks: int, left: list[int]) -> None:
    whole = _job(tmp_path / "whole", "Full", zero, ranks, keep=1)
    succeed(whole, ranks)
    broken = _job(tmp_path / "broken", "Full", zero, ranks, keep=1)
    assert -9 in start_worker(broken, ranks, 1, ("die_in_save", place, step)).wait()
    checkpoints = tmp_path / "broken" / "checkpoints"
    assert [entry.manifest.step for entry in committed(checkpoints)] == left
    succeed(broken, ranks, 2)
    log = (tmp_path / "broken" / "logs-2" / "rank-0.log").read_text()
    assert (f"at step {left[0]}" in log) if left else ("resumed" not in log)
    assert exported(broken) == exported(whole)
    assert steady_lines(broken) == steady_lines(whole)
    if left != [6, 3]:  # a finished job saves no more, and so removes none
        assert [path.name for path in checkpoints.iterdir()] == ["step-000006"]
