"""What prepare settles: steps, warm-up, ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prepare_kit import (
    job,
)

from posttrain_api.trainer import DeepSpeedConfig, LoraConfig, Topology
from posttrain_trainer.resolve import Facts, resolve


def _resolved(tmp_path: Path, facts: Facts, **fields: Any) -> Any:
    return resolve(job(tmp_path, tmp_path / "x", **fields), facts)


@pytest.mark.parametrize(
    ("training", "steps", "warmup"),
    [
        ({}, 25, 1),
        ({"epochs": 2.5}, 63, 2),
        ({"epochs": None, "max_steps": 400}, 400, 12),
        ({"schedule": "Constant"}, 25, 0),
        ({"warmup_steps": 7}, 25, 7),
        ({"epochs": 0.001}, 1, 1),
    ],
)
def test_steps(tmp_path: Path, training: dict[str, Any], steps: int, warmup: int) -> None:
    resolved = _resolved(tmp_path, Facts(100, 0, None, None), training=training)
    assert (resolved.total_steps, resolved.warmup_steps) == (steps, warmup)


GIB = 2**30
EIGHT = Topology(nodes=1, processes_per_node=8, gpus_per_node=8)
OFFLOADED = DeepSpeedConfig(offload_optimizer=True)
LORA = {"tuning": "LoRA", "lora": LoraConfig(rank=8, alpha=16, dropout=0, target_modules=("all-linear",))}
IN_4_BITS = {**LORA, "lora": LORA["lora"].model_copy(update={"quantization": "NF4"})}


@pytest.mark.parametrize(
    ("facts", "fields", "stage"),
    [
        (Facts(9, 10**6, None, None), {}, 0),
        (Facts(9, 10**6, None, None), {"topology": Topology(nodes=2, processes_per_node=1, gpus_per_node=0)}, 2),
        (Facts(9, 10**9, 80 * GIB, None), {"topology": Topology(nodes=1, processes_per_node=8, gpus_per_node=8)}, 2),
        (
            Facts(9, 8 * 10**9, 80 * GIB, None),
            {"topology": Topology(nodes=1, processes_per_node=8, gpus_per_node=8)},
            3,
        ),
        (Facts(9, 8 * 10**9, 80 * GIB, None), LORA, 2),
        (Facts(9, 32 * 10**9, 80 * GIB, None), LORA, 3),
        (Facts(9, 8 * 10**9, 80 * GIB, None), {"zero_stage": 1}, 1),
        (Facts(9, 10**6, None, None), IN_4_BITS, 0),
        (Facts(9, 100 * 10**9, 80 * GIB, None), IN_4_BITS, 2),
        (Facts(9, 10**6, None, None), {"training": {"precision": "BF16"}}, 2),
        (Facts(9, 10**6, None, None), {"deepspeed": OFFLOADED}, 2),
        (Facts(9, 16 * 10**9, 80 * GIB, None), LORA, 3),
        (Facts(9, 16 * 10**9, 80 * GIB, None), {**LORA, "training": {"precision": "BF16"}}, 2),
        (Facts(9, 8 * 10**9, 80 * GIB, None), {"topology": EIGHT, "training": {"precision": "BF16"}}, 2),
        (Facts(9, 9 * 10**9, 80 * GIB, None), {"topology": EIGHT, "deepspeed": OFFLOADED}, 2),
    ],
)
def test_zero_stage(tmp_path: Path, facts: Facts, fields: dict[str, Any], stage: int) -> None:
    assert _resolved(tmp_path, facts, **fields).zero_stage == stage


@pytest.mark.parametrize(
    ("asked", "parameters", "settled"),
    [("Auto", 10**9, True), ("Auto", 10**9 - 1, False), ("Auto", 0, False), (True, 5, True), (False, 10**10, False)],
)
def test_activations_are_computed_again(tmp_path: Path, asked: bool | str, parameters: int, settled: bool) -> None:
    facts = Facts(9, parameters, None, None)
    assert _resolved(tmp_path, facts, training={"gradient_checkpointing": asked}).gradient_checkpointing is settled
