"""bf16: fp32 masters and gradients at ZeRO 1 to 3, the finite check, and how far splits may differ.

Activations have 8 bits: each row's gradient is rounded where it is computed, so another cut of the batch gives another
update. Measured on two ranks after two steps of SGD, in parts of the update: splits and stages differ by up to 2.7e-3,
bf16 and fp32 from the same rounded weights by 5.7e-3 (full) and 6.7e-3 (LoRA); the losses by 1.2e-5, the norms by 9e-4.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_kit import SGD, Run, causal, plain_sgd, train_all
from safetensors import safe_open
from trainer_kit import make_config, make_model, prepare, rows, write_tokens

from posttrain_api.records import Resolved
from posttrain_api.trainer import LoraConfig
from posttrain_trainer.engine_config import EngineSettings, deepspeed_config
from posttrain_trainer.lora import add_adapter

SPLITS = {"whole": 10**6, "cut": 70}
LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
GRID = [f"{tuning}-z{zero}-{split}" for tuning, zero, split in product(("full", "lora"), (1, 2, 3), SPLITS)]
BROKEN = [f"broken-z{zero}-whole" for zero in (1, 2, 3)]
MERGED = "lora-z2-whole-merged"
BETWEEN, TO_FP32, LOSS, NORM = 1e-2, 2e-2, 1e-4, 5e-3
"""What was measured, times three to eight."""


def _make(root: Path, cell: str) -> None:
    tuning, zero, split, *merged = cell.split("-")
    changes: dict[str, Any] = (
        {"tuning": "LoRA", "lora": LORA, "merge_adapter": bool(merged)} if tuning == "lora" else {}
    )
    if tuning == "broken":
        changes = {"training__learning_rate": 1e30, "training__max_steps": 3}
    given = {"training__precision": "BF16", "training__tokens_per_micro_batch": SPLITS[split]}
    config = make_config(root / cell, zero_stage=int(zero[1]), **{**SGD, **given, **changes})
    total = config.training.max_steps or 0
    values = {"zero_stage": int(zero[1]), "warmup_steps": 0, "total_steps": total, "attention": "SDPA"}
    prepare(config, rows(20), model_dir=str(root / "model"), resolved=Resolved(**values, precision="BF16"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bf16")
    make_model(root / "model")
    cells = [*GRID, MERGED, *BROKEN]
    for cell in cells:
        _make(root, cell)
    write_tokens(root / "probe", rows(3, seed=9))
    train_all(root, cells, 2, probe=True)
    return root


@pytest.fixture(scope="module")
def fp32(trained: Path) -> dict[str, Run]:
    config = make_config(trained / GRID[0], **SGD)
    lora = add_adapter(causal(trained / "model"), LoraConfig(**LORA), config.training.seed)
    return {"full": plain_sgd(causal(trained / "model"), config), "lora": plain_sgd(lora, config)}


def _masters(root: Path, cell: str) -> dict[str, torch.Tensor]:
    failed = root / cell / "failed.txt"
    assert not failed.exists(), failed.read_text()
    return {name.removeprefix("lm."): each for name, each in torch.load(root / cell / "masters.pt").items()}


def _apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], run: Run) -> float:
    off = sum(float(((one[name] - other[name]).double() ** 2).sum()) for name in run.end)
    length = sum(float(((end - run.start[name]).double() ** 2).sum()) for name, end in run.end.items())
    return float((off / length) ** 0.5)


@pytest.mark.parametrize("cell", GRID)
def test_the_update_is_nearly_fp32s(trained: Path, fp32: dict[str, Run], cell: str) -> None:
    run, masters = fp32[cell[:4]], _masters(trained, cell)
    assert {each.dtype for each in masters.values()} == {torch.float32}
    rounded = {name: end - run.start[name] + run.start[name].bfloat16() for name, end in run.end.items()}
    apart = _apart(masters, rounded, run)
    print(f"{cell}: {apart:.1e} from fp32")
    assert 1e-5 < apart < TO_FP32
    for ours, theirs in zip(json.loads((trained / cell / "lines.json").read_text()), run.lines, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=NORM)


@pytest.mark.parametrize("cell", [cell for cell in GRID if not cell.endswith("z2-whole")])
def test_stages_and_splits_are_nearly_alike(trained: Path, fp32: dict[str, Run], cell: str) -> None:
    run = fp32[cell[:4]]
    apart = _apart(_masters(trained, cell), _masters(trained, f"{cell[:4]}-z2-whole"), run)
    print(f"{cell}: {apart:.1e} from ZeRO 2, whole")
    assert apart < BETWEEN


def test_masters_keep_what_bf16_cannot(trained: Path) -> None:
    masters = _masters(trained, "full-z2-whole")
    assert any(not torch.equal(each, each.bfloat16().float()) for each in masters.values())


def test_gradients_are_added_up_in_fp32() -> None:
    """DeepSpeed's default adds micro-batches in the model's own type: too little to be seen in three of them."""
    config = deepspeed_config(EngineSettings(zero_stage=2, max_grad_norm=1.0, bf16=True), 0)
    assert (config["bf16"], config["data_types"]) == ({"enabled": True}, {"grad_accum_dtype": "fp32"})
    assert not {"bf16", "data_types"} & set(deepspeed_config(EngineSettings(zero_stage=2, max_grad_norm=1.0), 0))


@pytest.mark.parametrize("cell", BROKEN)
def test_a_step_that_is_not_finite_ends_the_job(trained: Path, cell: str) -> None:
    assert (trained / cell / "failed.txt").read_text().startswith("NonFinite")


@pytest.mark.parametrize("cell", ["full-z2-whole", "full-z3-cut", "lora-z3-cut", MERGED])
def test_the_export_is_bf16_as_it_was_trained(trained: Path, cell: str) -> None:
    output = trained / cell / "output"
    (file,) = output.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118
    if cell.startswith("full") or cell == MERGED:
        assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    if cell.startswith("full"):
        exported = dict(causal(output).named_parameters())
        for name, master in _masters(trained, cell).items():
            assert torch.equal(exported[name], master.bfloat16().float())
