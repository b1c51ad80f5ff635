"""Evaluation: by token over the whole set, the same for any ranks and cuts, and without a trace in the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from trainer_kit import Shape, exported, make_config, make_model, prepare, rows, steady_lines, succeed

HELD_OUT = rows(11, seed=1)


def _run(run_dir: Path, ranks: int, zero: int, budget: int, every: int | None = 1) -> Any:
    config = make_config(
        run_dir,
        zero_stage=zero,
        evaluation__every_steps=every,
        training__max_steps=2,
        training__tokens_per_micro_batch=budget,
        topology__processes_per_node=ranks,
    )
    make_model(run_dir / "model", Shape(attention_dropout=0.2))
    prepare(config, rows(25), HELD_OUT)
    return config, succeed(config, ranks)


def _by_hand(folder: Path) -> tuple[float, float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, hits, count = 0.0, 0.0, 0
    for tokens, mask in HELD_OUT:
        ids = torch.tensor(tokens)[None]
        with torch.no_grad():
            log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        for position in range(1, len(tokens)):
            if mask[position]:
                total -= float(log_probs[position - 1, tokens[position]])
                hits += float(log_probs[position - 1].argmax() == tokens[position])
                count += 1
    return total / count, hits / count


@pytest.mark.parametrize(("ranks", "zero", "budget"), [(1, 0, 60), (2, 0, 1), (2, 3, 60)])
def test_eval_loss_is_the_mean_over_tokens(tmp_path: Path, ranks: int, zero: int, budget: int) -> None:
    _, success = _run(tmp_path, ranks, zero, budget)
    loss, accuracy = _by_hand(tmp_path / "output")
    assert success["metrics"]["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert success["metrics"]["eval_mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-6)


@pytest.mark.parametrize("zero", [0, 3])
def test_evaluation_leaves_no_trace_in_training(tmp_path: Path, zero: int) -> None:
    often, _ = _run(tmp_path / "often", 1, zero, 60)
    once, _ = _run(tmp_path / "once", 1, zero, 60, every=None)
    assert exported(often) == exported(once)
    assert ["eval_loss" in line for line in steady_lines(often)] == [True, True]
    assert ["eval_loss" in line for line in steady_lines(once)] == [False, True]
