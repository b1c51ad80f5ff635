"""The reference beside the training: no trace of it in what is learned, and a cache that is only used where it is
right. That every kind of reference gives the right update is test_invariance_pairs.py's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from trainer_kit import (
    Shape,
    call,
    exported,
    make_config,
    make_model,
    pairs,
    prepare,
    run_ranks,
    run_worker,
    steady_lines,
    succeed,
)

from posttrain_api.names import CHECKPOINTS_DIR, COMMITTED_FILE
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.dropout import without_dropout

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.3, "target_modules": ["all-linear"]}
TRAIN, HELD_OUT = pairs(9, seed=1), pairs(4, seed=2)


def _job(run_dir: Path, ranks: int = 1, **changes: Any) -> TrainerConfig:
    given = {"lora": LORA} if changes.get("tuning") == "LoRA" else {}
    config = make_config(
        run_dir,
        stage="Preference",
        algorithm="DPO",
        training__max_steps=2,
        training__batch_size=4,
        topology__processes_per_node=ranks,
        **given,
        **changes,
    )
    if not (run_dir / "model").exists():
        make_model(run_dir / "model", Shape(attention_dropout=0.4))
    prepare(config, TRAIN, HELD_OUT)
    return config


def begin_anew(run_dir: Path) -> None:
    """Forgets what was trained, and that it was saved."""
    shutil.rmtree(run_dir / CHECKPOINTS_DIR)
    (run_dir / COMMITTED_FILE).unlink(missing_ok=True)


def _caches(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "prepared").glob("*/reference-*.npy"))


def test_the_cache_is_written_once_and_read_again(tmp_path: Path) -> None:
    """Train and held-out rows, whole; a second attempt reads them, with another's numbers in them it is seen."""
    config = _job(tmp_path, ranks=2, preference__cache_reference=True)
    succeed(config, ranks=2)
    caches = _caches(tmp_path)
    assert [(path.parent.name, np.load(path).shape) for path in caches] == [("eval", (4, 2)), ("train", (9, 2))]
    assert all(np.isfinite(np.load(path)).all() and np.load(path).dtype == np.float32 for path in caches)
    before = exported(config)
    stamps = [path.stat().st_mtime_ns for path in caches]
    shutil.rmtree(tmp_path / "output")
    begin_anew(tmp_path)
    succeed(config, ranks=2, attempt=2)
    assert exported(config) == before
    assert [path.stat().st_mtime_ns for path in _caches(tmp_path)] == stamps


def test_a_torn_cache_is_made_anew(tmp_path: Path) -> None:
    config = _job(tmp_path, preference__cache_reference=True)
    succeed(config)
    before = exported(config)
    for path in _caches(tmp_path):
        path.write_bytes(path.read_bytes()[:-9])
    begin_anew(tmp_path)
    succeed(config, attempt=2)
    assert exported(config) == before
    assert [np.load(path).shape for path in _caches(tmp_path)] == [(4, 2), (9, 2)]


def test_the_cache_of_another_model_is_not_used(tmp_path: Path) -> None:
    """Same rows, another starting policy: its own numbers are computed, and the loss begins at log 2."""
    config = _job(tmp_path, preference__cache_reference=True)
    succeed(config)
    shutil.rmtree(tmp_path / "model")
    begin_anew(tmp_path)
    make_model(tmp_path / "model", Shape(), seed=9)
    prepare(config, TRAIN, HELD_OUT)
    succeed(config, attempt=2)
    assert len(_caches(tmp_path)) == 4


def test_a_wrong_reference_is_seen_in_the_first_step(tmp_path: Path) -> None:
    """As a cache whose file has another model's numbers under this model's name."""
    config = _job(tmp_path, preference__cache_reference=True)
    succeed(config)
    for path in _caches(tmp_path):
        values = np.load(path)
        values[:, 0] += 0.5
        np.save(path, values)
    begin_anew(tmp_path)
    (end,) = run_worker(config, attempt=2)
    assert end["reason"] == "ModelIncompatible"
    assert "must be 0.693147" in end["message"]
    assert not list((tmp_path / "checkpoints").glob("step-*/manifest.json"))


def test_stopped_while_the_cache_is_made(tmp_path: Path) -> None:
    """Nothing half is left, and the next attempt begins again."""
    config = _job(tmp_path, ranks=2, preference__cache_reference=True)
    found = run_worker(config, ranks=2, job=("term_at", "forward", 2, 1))
    assert [end["reason"] for end in found] == ["Preempted", "Preempted"]
    assert not _caches(tmp_path)
    succeed(config, ranks=2, attempt=2)


@pytest.mark.parametrize("zero", [0, 3])
def test_adapters_off_and_on_again(tmp_path: Path, zero: int) -> None:
    """Inside the scope the base alone answers, after it the adapter; gradients of what is accumulated stay."""
    config = _job(tmp_path, tuning="LoRA", zero_stage=zero)
    run_ranks(call, ("adapter_scope", str(tmp_path)), 1, tmp_path)
    found = json.loads((tmp_path / "scope.json").read_text())
    assert found["off"] == found["base"]
    assert found["on"] == found["again"] != found["base"]
    assert found["learning"] == found["learning_after"]
    assert config.lora is not None


def test_dropout_is_off_for_good() -> None:
    layer = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Dropout2d(0.5))
    layer.attention_dropout = 0.4
    without_dropout(layer.train())
    assert layer.attention_dropout == 0.0
    assert layer.training
    assert torch.equal(layer(torch.ones(2, 3, 4, 4)), torch.ones(2, 3, 4, 4))


@pytest.mark.parametrize("zero", [0, 3])
def test_a_second_model_is_freed_when_the_cache_is_full(tmp_path: Path, zero: int) -> None:
    make_model(tmp_path / "other", seed=4)
    reference = {"source": {"uri": "pvc://models/other", "path": str(tmp_path / "other")}}
    config = _job(tmp_path, zero_stage=zero, reference=reference, preference__cache_reference=True)
    given = {"reference_dir": str(tmp_path / "other"), "reference_digest": "sha256:other"}
    prepare(config, TRAIN, HELD_OUT, **given)
    run_ranks(call, ("second_models", str(tmp_path)), 1, tmp_path)
    models = json.loads((tmp_path / "models.json").read_text())
    assert models["made"] > 10_000
    assert models["held"] == 0
    values = np.load(_caches(tmp_path)[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float32).eval()
    assert values[3].tolist() == pytest.approx([_sum(model, *example) for example in TRAIN[3]], rel=1e-6)


@torch.no_grad()
def _sum(model: Any, tokens: list[int], mask: list[int]) -> float:
    log_probs = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    return sum(float(log_probs[at - 1, tokens[at]]) for at in range(1, len(tokens)) if mask[at])


@pytest.mark.parametrize("cached", [False, True])
def test_bf16_begins_at_log_2(tmp_path: Path, cached: bool) -> None:
    """Frozen copy: the same forward, the same bits. Cached in other micro-batches: within bf16's rounding."""
    config = _job(tmp_path, zero_stage=2, training__precision="BF16", preference__cache_reference=cached)
    prepare(config, TRAIN, HELD_OUT, precision="BF16")
    succeed(config)
    first = steady_lines(config)[0]
    assert first["loss"] == pytest.approx(0.693147, abs=3e-2 if cached else 1e-6)


def test_the_reference_has_its_own_time(tmp_path: Path) -> None:
    config = _job(tmp_path)
    succeed(config)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["time/reference"] < line["step_time"]
