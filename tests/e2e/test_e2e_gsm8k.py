"""Real data on two nodes: GSM8K, full fine-tuning under ZeRO 3, two processes a pod."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import e2e_models
import pytest
from e2e_kit import TINY_SFT, Bench, job

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("e2e")]

DATA = Path(os.environ.get("POSTTRAIN_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data") / "gsm8k"
ROWS, STEPS = 256, 6


def test_two_nodes_learn_from_gsm8k(bench: Bench) -> None:
    if not (DATA / "train.jsonl").exists():
        pytest.skip(f"{DATA}/train.jsonl is not there: set POSTTRAIN_TEST_DATA to the folder of gsm8k/")
    target = bench.volume() / "gsm8k" / "train.jsonl"
    target.parent.mkdir()
    shutil.copy(DATA / "train.jsonl", target)
    rows = [json.loads(line) for line in target.read_text().splitlines()[:ROWS]]
    words = e2e_models.tokenizer([row["question"] + row["answer"] for row in rows], 1024)
    e2e_models.save(bench.volume() / "models" / "gsm8k", words, hidden=64, length=512)
    columns = {"prompt": "question", "completion": "answer"}
    source = {"uri": "pvc://runs/gsm8k/train.jsonl", "columns": columns, "maxRows": ROWS}
    bench.apply(
        job(
            "gsm8k",
            TINY_SFT,
            model={"uri": "pvc://runs/models/gsm8k"},
            data={"train": [source], "maxLength": 512},
            lora=None,
            tuning="Full",
            training={"maxSteps": STEPS, "batchSize": 16, "learningRate": 5e-3},
            deepspeed={"zeroStage": 3},
            resources={"nodes": 2, "gpusPerNode": 2, "memory": "4Gi"},
        )
    )
    status = bench.succeeded("gsm8k", 240)
    losses = [line["loss"] for line in bench.metrics("gsm8k") if "loss" in line]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.1, losses
    assert status["dataReport"]["rows"] == ROWS
    assert status["resolved"]["deepspeed"]["zeroStage"] == 3
    assert status["resources"] == {"gpus": 4, "pods": 2}
    assert len(status["attempt"]["podUIDs"]) == 2
