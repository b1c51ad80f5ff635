"""SIGTERM to one rank, at any moment: all agree, the half-done step is dropped, what is saved goes on as if nothing
had been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer_kit import Shape, exported, make_config, make_model, prepare, rows, run_worker, steady_lines, succeed

from posttrain_trainer.checkpoint_files import committed


def _job(run_dir: Path, ranks: int, zero: int) -> Any:
    config = make_config(
        run_dir,
        zero_stage=zero,
        evaluation__every_steps=2,
        training__max_steps=5,
        training__tokens_per_micro_batch=1,  # one row a micro-batch: six a step over the ranks, nine to evaluate
        topology__processes_per_node=ranks,
    )
    make_model(run_dir / "model", Shape(attention_dropout=0.2))
    prepare(config, rows(25), rows(9, seed=1))
    return config


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    jobs = {}
    for ranks, zero in ((1, 0), (2, 2), (2, 3)):
        jobs[ranks, zero] = _job(tmp_path_factory.mktemp("whole"), ranks, zero)
        succeed(jobs[ranks, zero], ranks)
    return jobs


@pytest.mark.parametrize(
    ("ranks", "zero", "forward", "rank", "saved"),
    [
        (1, 0, 9, 0, 1),  # third micro-batch of step 2
        (1, 0, 15, 0, 2),  # third of the evaluation after step 2
        (2, 2, 5, 1, 1),  # second of step 2, on the other rank
        (2, 3, 8, 1, 2),  # second of the evaluation after step 2
        (2, 3, 1, 0, 0),  # in the first step: nothing to save
    ],
)
def test_stopped_and_resumed_is_bit_equal(
    tmp_path: Path, undisturbed: dict[tuple[int, int], Any], ranks: int, zero: int, forward: int, rank: int, saved: int
) -> None:
    config = _job(tmp_path, ranks, zero)
    ends = run_worker(config, ranks, 1, ("term_at", "forward", forward, rank))
    assert [(end["reason"], end["exitCode"], end["step"]) for end in ends] == [("Preempted", 143, saved)] * ranks
    assert [entry.manifest.step for entry in committed(tmp_path / "checkpoints")] == ([saved] if saved else [])
    succeed(config, ranks, 2)
    assert exported(config) == exported(undisturbed[ranks, zero])
    assert steady_lines(config) == steady_lines(undisturbed[ranks, zero])
