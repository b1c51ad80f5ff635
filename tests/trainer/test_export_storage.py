"""A storage that is full when the model is to be exported: a reason that says so, nothing lost, nothing half written,
and the next attempt only exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import resume_jobs
from trainer_kit import make_config, make_model, prepare, rows, run_ranks


@pytest.mark.parametrize(("place", "tuning"), [("output", "Full"), ("best", "LoRA")])
def test_full_at_the_export(tmp_path: Path, place: str, tuning: str) -> None:
    run_dir = tmp_path / "run"
    lora = {"lora": {"rank": 16, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}}
    config = make_config(
        run_dir,
        tuning=tuning,
        **(lora if tuning == "LoRA" else {}),
        training__max_steps=3,
        training__learning_rate=10.0,  # gets worse: the best is not the last
        evaluation={"every_steps": 1, "keep_best": True},
        checkpoint__keep_last=1,
    )
    make_model(run_dir / "model")
    prepare(config, rows(25), rows(9, seed=1))
    result = tmp_path / "found.json"
    room = 20_000  # enough for the tokenizer's files, not for weights
    run_ranks(resume_jobs.full_at_export, (place, room, str(result), str(run_dir)), 1, tmp_path / "logs")
    found = json.loads(result.read_text())
    if "skipped" in found:
        pytest.skip(found["skipped"])
    first, second = found["first"], found["second"]
    assert (first["end"]["reason"], first["end"]["exitCode"], first["end"]["step"]) == ("StorageFull", 51, 3)
    assert "Enlarge or empty the claim" in first["end"]["message"]
    assert first["exported"] == (["output"] if place == "best" else [])
    best = second["end"]["success"]["best"]["step"]
    assert best < 3
    assert first["whole"] == second["whole"] == ["step-000003", f"step-{best:06d}"]
    assert second["exported"] == ["best", "output"]
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "at step 3" in log.rpartition("resumed from")[2]
