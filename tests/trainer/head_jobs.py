"""What test_head.py runs in ranks: two steps of a tiny model through the real engine, for many cells in one group."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from trainer_jobs import sgd
from trainer_kit import Shape, rows

from posttrain_api.trainer import LoraConfig, Topology
from posttrain_trainer import engine as engine_module
from posttrain_trainer import head as head_module
from posttrain_trainer import runtime as runtime_module
from posttrain_trainer.lora import add_adapter
from posttrain_trainer.microbatch import MicroBatch, collate, dummy
from posttrain_trainer.scorer import Scorer
from posttrain_trainer.tokenset import Example, TrainingRow

KINDS = ("untied", "tied", "untied-frozen", "tied-frozen", "untied-checkpointed", "untied-adapter")
STEPS, ROWS, RATE, TEMPERATURE, TILE = 2, 6, 0.3, 0.7, 100


def model_of(kind: str) -> Any:
    """Drawn alike each time. `frozen`: the head does not learn; `adapter`: a low-rank one on the head and the body."""
    torch.manual_seed(3)
    model: Any = transformers.AutoModelForCausalLM.from_config(
        Shape(layers=1, tied=kind.startswith("tied")).config(), dtype=torch.float32
    )
    if kind.endswith("frozen"):
        model.get_output_embeddings().weight.requires_grad_(False)
    if kind.endswith("checkpointed"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    if kind.endswith("adapter"):
        model = add_adapter(
            model, LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=("lm_head", "q_proj")), seed=5
        )
        for name, parameter in model.named_parameters():  # away from zero: there the A matrices have no gradient
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def examples() -> list[TrainingRow]:
    """Rows of different lengths."""
    made = [Example(np.array(ids, dtype=np.int32), np.array(mask, dtype=np.uint8)) for ids, mask in rows(ROWS, seed=4)]
    return [TrainingRow((example,), {}) for example in made]


def micros(rank: int, ranks: int) -> list[MicroBatch]:
    """A rank's own rows, two at a time, and a micro-batch in which nothing counts."""
    mine = examples()[rank::ranks]
    return [*(collate(mine[place : place + 2]) for place in range(0, len(mine), 2)), dummy(mine[0])]


def cells(folder: str, names: list[str], ranks: int) -> None:
    """Trains each cell `<kind>-z<stage>`; rank 0 keeps loss, gradient norm and weights. Tiles are small."""
    engine_module.PERSISTENCE_THRESHOLD = 0
    head_module.TILE = TILE
    runtime = runtime_module.start(Topology(nodes=1, processes_per_node=ranks, gpus_per_node=0), 0)
    for name in names:
        kind, zero = name.rsplit("-z", 1)
        model = model_of(kind)
        learning = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        settings = engine_module.EngineSettings(int(zero), 0.0)
        engine = engine_module.Engine(Scorer(model, TEMPERATURE), sgd(learning), settings)
        lines = [_step(engine, runtime.rank, ranks) for _ in range(STEPS)]
        found = {}
        for parameter_name, parameter in engine.module.named_parameters():
            with engine.gathered([parameter]):
                found[parameter_name.removeprefix("lm.")] = parameter.detach().clone()
        if runtime.first:
            torch.save({"lines": lines, "weights": found}, Path(folder) / f"{name}.pt")
        del engine, model
        gc.collect()


def _step(engine: Any, rank: int, ranks: int) -> dict[str, float]:
    """The sums are over all ranks."""
    count = sum(int(row.examples[0].mask[1:].sum()) for row in examples())
    sums = torch.zeros(3)
    mine = micros(rank, ranks)
    with torch.no_grad():  # as evaluation between two steps does
        engine.forward(mine[0])
    for micro in mine:
        logp, entropy, correct = engine.forward(micro)
        engine.backward(-(micro.weights * logp).sum() * ranks / count)
        sums += torch.stack([(micro.weights * each.detach()).sum() for each in (logp, entropy, correct)])
    torch.distributed.all_reduce(sums)
    engine.set_learning_rate(RATE)
    norm = engine.step().grad_norm
    return {"logp": float(sums[0]), "entropy": float(sums[1]), "correct": float(sums[2]), "norm": norm}
