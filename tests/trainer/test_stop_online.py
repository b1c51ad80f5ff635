"""Stage RL, SIGTERM between a rollout and the first update that learns from it: the step is dropped with all that it
would have carried to the next one, and the attempt after it does it again, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from online_kit import ADAPTIVE, DYNAMIC, online_job, samples
from trainer_kit import Shape, exported, make_model, run_worker, steady_lines, succeed

from posttrain_trainer.checkpoint_files import committed


@pytest.mark.parametrize(
    ("algorithm", "changes", "ranks", "zero", "update"),
    [
        ("GRPO", DYNAMIC, 1, 0, 3),  # of two a step
        ("PPO", ADAPTIVE, 2, 2, 5),  # of four a step
    ],
    ids=["grpo", "ppo"],
)
def test_stopped_and_resumed_is_bit_equal(
    tmp_path: Path, algorithm: str, changes: dict[str, Any], ranks: int, zero: int, update: int
) -> None:
    make_model(tmp_path / "model", Shape(attention_dropout=0.2))
    whole, stopped = (
        online_job(
            tmp_path / name,
            tmp_path / "model",
            algorithm,
            zero_stage=zero,
            topology__processes_per_node=ranks,
            **changes,
        )
        for name in ("whole", "stopped")
    )
    succeed(whole, ranks)
    ends = run_worker(stopped, ranks, 1, ("term_at", "update", update, ranks - 1))
    assert [(end["reason"], end["exitCode"], end["step"]) for end in ends] == [("Preempted", 143, 1)] * ranks
    assert [entry.manifest.step for entry in committed(tmp_path / "stopped" / "checkpoints")] == [1]
    succeed(stopped, ranks, 2)
    assert exported(stopped) == exported(whole)
    assert steady_lines(stopped) == steady_lines(whole)
    assert samples(tmp_path / "stopped") == samples(tmp_path / "whole")
