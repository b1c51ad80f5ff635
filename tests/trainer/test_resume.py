"""kill -9 at a random moment, and the next attempt: the same weights to the bit and the same lines in metrics.jsonl.

Every stage and kind of reference, full, LoRA and LoRA on 4 bits, fp32 and bf16; with dropout where the stage has it, so
that the random state matters, and with evaluation in between, so that it must not. Each cell is killed once, inside its
computation or inside a save; where exactly is drawn from SEED, POSTTRAIN_TEST_SEED says another. Undisturbed and
resumed runs share a process group per number of ranks.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import resume_jobs
from plain_kit import model_digest
from trainer_kit import (
    Shape,
    exported,
    make_config,
    make_model,
    make_reward_model,
    pairs,
    prepare,
    rows,
    start_ranks,
    steady_lines,
)

from posttrain_trainer.checkpoint_files import committed

SEED = int(os.environ.get("POSTTRAIN_TEST_SEED", "4"))
STEPS, EVERY = 6, 2
WAIT = 600
pytestmark = pytest.mark.timeout(2 * WAIT)  # on a busy machine; alone it is done in a minute
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.2, "target_modules": ["all-linear"]}
COMPUTATION = ("forward", "optimizer", "applied", "line", "evaluation")
SAVE = ("DeepSpeed", "manifest", "commit", "removal")
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"stage": "Pretrain"},
    "sft": {"stage": "SFT"},
    "reward": {"stage": "RewardModel", "reward_model__centering": 0.05},
    "dpo": {"stage": "Preference", "algorithm": "DPO", "preference__sft_weight": 0.3},
    "simpo": {"stage": "Preference", "algorithm": "SimPO"},
}
# stage, reference, tuning, ZeRO stage, ranks, precision, where it is killed
CELLS = [
    ("pretrain", "none", "Full", 0, 1, "FP32", COMPUTATION),
    ("pretrain", "none", "Full", 2, 2, "BF16", SAVE),
    ("sft", "none", "Full", 1, 2, "FP32", COMPUTATION),
    ("sft", "none", "Full", 3, 2, "FP32", SAVE),
    ("sft", "none", "LoRA", 0, 1, "FP32", SAVE),
    ("sft", "none", "LoRA", 3, 2, "BF16", COMPUTATION),
    ("sft", "none", "NF4", 2, 2, "BF16", SAVE),
    ("reward", "none", "Full", 0, 1, "FP32", SAVE),
    ("reward", "none", "Full", 3, 1, "BF16", COMPUTATION),
    ("reward", "none", "LoRA", 2, 2, "FP32", COMPUTATION),
    ("dpo", "off", "LoRA", 0, 2, "FP32", SAVE),
    ("dpo", "off", "LoRA", 3, 1, "BF16", COMPUTATION),
    ("dpo", "off", "NF4", 0, 1, "FP32", COMPUTATION),
    ("dpo", "frozen", "Full", 0, 1, "FP32", COMPUTATION),
    ("dpo", "other", "Full", 3, 2, "FP32", COMPUTATION),
    ("dpo", "cached", "Full", 2, 2, "BF16", SAVE),
    ("dpo", "cached", "LoRA", 2, 1, "FP32", COMPUTATION),
    ("simpo", "none", "Full", 1, 1, "BF16", SAVE),
]


@dataclass(frozen=True)
class Cell:
    """A job and how its first attempt ends."""

    name: str
    stage: str
    reference: str
    tuning: str
    zero: int
    ranks: int
    precision: str
    place: str
    step: int
    rank: int


def _cell(*drawn_for: Any) -> Cell:
    *settings, places = drawn_for
    stage, reference, tuning, zero, ranks, precision = settings
    name = f"{stage}-{reference}-{tuning}-z{zero}-r{ranks}-{precision}"
    chance = random.Random(f"{SEED} {name}")
    place = chance.choice(places)
    step = chance.randint(1, STEPS)
    if places is SAVE or place == "evaluation":
        step = chance.randrange(EVERY, STEPS - EVERY + 1 if place == "removal" else STEPS + 1, EVERY)
    only_first = place in ("line", "manifest", "commit", "removal")
    return Cell(name, *settings, place, step, 0 if only_first else chance.randrange(ranks))


DRAWN = {cell.name: cell for cell in (_cell(*settings) for settings in CELLS)}


def _make(folder: Path, models: Path, cell: Cell) -> Any:
    changes: dict[str, Any] = {
        "Full": {},
        "LoRA": {"lora": LORA},
        "NF4": {"lora": {**LORA, "quantization": "NF4"}},
    }[cell.tuning]
    given: dict[str, Any] = {}
    if cell.reference == "other":
        changes["reference"] = {"source": {"uri": "pvc://models/other", "path": str(models / "other")}}
        given = {"reference_dir": str(models / "other"), "reference_digest": model_digest(models / "other")}
    config = make_config(
        folder,
        tuning="Full" if cell.tuning == "Full" else "LoRA",
        zero_stage=cell.zero,
        evaluation={"every_steps": EVERY, "keep_best": cell.place != "removal"},
        checkpoint__every_steps=EVERY,
        checkpoint__keep_last=1,
        topology__processes_per_node=cell.ranks,
        training__max_steps=STEPS,
        training__precision=cell.precision,
        preference__cache_reference=cell.reference == "cached",
        **STAGES[cell.stage],
        **changes,
    )
    two = cell.stage not in ("pretrain", "sft")
    train, held_out = (pairs(20), pairs(5, seed=1)) if two else (rows(25), rows(9, seed=1))
    model = models / ("reward" if cell.stage == "reward" else "model")
    prepare(config, train, held_out, model_dir=str(model), precision=cell.precision, **given)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `whole/<cell>`, never disturbed, and `broken/<cell>`: killed once, resumed once."""
    root = tmp_path_factory.mktemp("resume")
    make_model(root / "model", Shape(attention_dropout=0.2))
    make_model(root / "other", seed=4)
    make_reward_model(root / "reward", Shape(attention_dropout=0.2))
    for name, cell in DRAWN.items():
        for kind in ("whole", "broken"):
            _make(root / kind / name, root, cell)
    for name, cell in DRAWN.items():
        folder = root / "broken" / name
        given = (cell.place, cell.step, cell.rank, [str(folder)])
        codes = start_ranks(resume_jobs.killed, given, cell.ranks, folder / "logs-1").wait()
        (folder / "codes.json").write_text(json.dumps(codes))
        (folder / "left.json").write_text(json.dumps(_steps(folder)))
    for ranks in (1, 2):
        names = [name for name, cell in DRAWN.items() if cell.ranks == ranks]
        for number, kind in ((1, "whole"), (2, "broken")):
            folders = [str(root / kind / name) for name in names]
            running = start_ranks(resume_jobs.attempt, (number, folders), ranks, root / f"{kind}-{ranks}")
            assert running.wait(WAIT) == [0] * ranks, running.output()
    return root


def _steps(folder: Path) -> list[int]:
    return [entry.manifest.step for entry in committed(folder / "checkpoints")]


def _newest(cell: Cell) -> int:
    """Step of the newest checkpoint that is committed when the rank dies; 0: there is none."""
    before = (cell.step - 1) // EVERY * EVERY
    return {"commit": cell.step, "removal": cell.step + EVERY}.get(cell.place, before)


@pytest.mark.parametrize("name", DRAWN)
def test_killed_and_resumed_is_bit_equal(runs: Path, name: str) -> None:
    cell = DRAWN[name]
    print(f"seed {SEED}: rank {cell.rank} killed at {cell.place} of step {cell.step}")
    whole, broken = runs / "whole" / name, runs / "broken" / name
    ends = [_end(folder) for folder in (whole, broken)]
    assert all("success" in end for end in ends), ends
    codes = json.loads((broken / "codes.json").read_text())
    assert [code for rank, code in enumerate(codes) if rank == cell.rank] == [-9], codes
    newest = _newest(cell)
    assert json.loads((broken / "left.json").read_text())[:1] == ([newest] if newest else [])
    log = (runs / f"broken-{cell.ranks}" / "rank-0.log").read_text()
    resumed = [line.rpartition(" at step ")[2] for line in log.splitlines() if f"resumed from {broken}/" in line]
    assert resumed == ([str(newest)] if newest else [])
    configs = [make_config(folder) for folder in (whole, broken)]
    weights, lines = [exported(config) for config in configs], [steady_lines(config) for config in configs]
    assert weights[0]
    assert weights[0] == weights[1]
    assert [line["step"] for line in lines[0]] == list(range(1, STEPS + 1))
    assert lines[0] == lines[1]
    assert _same(ends[0]) == _same(ends[1])


def _end(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "work" / "ends" / "rank-0.json").read_text())
    return found


def _same(end: dict[str, Any]) -> dict[str, Any]:
    """Of the success record what does not name a time or a place."""
    return {name: end["success"].get(name) for name in ("step", "best", "resolved")}


def test_the_lines_are_those_of_a_training(runs: Path) -> None:
    """What is compared is no constant: the loss moves, and two kinds of training do not train alike. Cells of one kind
    do, some to the last bit: ranks and ZeRO stages change no result."""
    lines = {name: steady_lines(make_config(runs / "whole" / name)) for name in DRAWN}
    assert all(len({line["loss"] for line in found}) > 2 for found in lines.values())
    kinds = {(cell.stage, cell.tuning, cell.precision): lines[name][-1]["loss"] for name, cell in DRAWN.items()}
    assert len(set(kinds.values())) == len(kinds) > 10
