"""Chains of adapters and an adapter trained further: the update, the export and its manifest, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from plain_kit import (
    SGD,
    Run,
    assert_same,
    causal,
    check_unchanged,
    logp_of_rows,
    make_chain,
    merged_by_hand,
    model_digest,
    on_chain,
    plain_sgd,
    train_all,
)
from trainer_kit import make_config, make_model, prepare, rows, write_tokens

from posttrain_api.trainer import LoraConfig, TrainerConfig
from posttrain_trainer.adapters import adapter_files
from posttrain_trainer.lora import add_adapter
from posttrain_trainer.model_files import CONFIG, digest_of
from posttrain_trainer.prepared import PreparedAdapter

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
CONTINUED: dict[str, Any] = {"alpha": 1.0, "dropout": 0.0, "target_modules": ["all-linear"], "continue_adapter": True}
CELLS: dict[str, dict[str, Any]] = {
    "chain": {"tuning": "LoRA", "lora": LORA, "zero_stage": 2},
    "chain-z3": {"tuning": "LoRA", "lora": LORA, "zero_stage": 3},
    "merged": {"tuning": "LoRA", "lora": LORA, "zero_stage": 2, "merge_adapter": True},
    "continued": {"tuning": "LoRA", "lora": CONTINUED, "zero_stage": 2},
    "continued-z3": {"tuning": "LoRA", "lora": CONTINUED, "zero_stage": 3},
    "full": {"tuning": "Full", "zero_stage": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chains")
    make_model(root / "model")
    chain = make_chain(root)
    for cell, changes in CELLS.items():
        used = chain[::-1] if cell.startswith("continued") else chain  # the plain one is trained further
        config = make_config(root / cell, model=on_chain(root, used), **{**SGD, **changes})
        prepared = [PreparedAdapter(dir=str(each), digest=digest_of(adapter_files(each))) for each in used]
        prepare(config, rows(20), model_dir=str(root / "model"), adapters=tuple(prepared))
    write_tokens(root / "probe", rows(3, seed=9))
    train_all(root, CELLS, 2, probe=True)
    return root


def _config(root: Path, cell: str) -> TrainerConfig:
    return TrainerConfig.model_validate_json((root / cell / "config.json").read_text())


def _expected(root: Path, cell: str) -> Run:
    config = _config(root, cell)
    if cell.startswith("continued"):
        start = merged_by_hand(root, ["second"])
        return plain_sgd(peft.PeftModel.from_pretrained(start, root / "first", is_trainable=True), config)
    start = merged_by_hand(root, ["first", "second"])
    return plain_sgd(add_adapter(start, LoraConfig(**LORA), 7) if config.lora else start, config)


@pytest.mark.parametrize("cell", CELLS)
def test_training_starts_from_the_merged_chain(trained: Path, cell: str) -> None:
    assert_same(trained / cell, _expected(trained, cell))


@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_the_export_is_the_trained_model(trained: Path, cell: str) -> None:
    """An adapter on base and parents; a merged model, and a full one, alone."""
    output = trained / cell / "output"
    if (output / CONFIG).exists():
        model = causal(output)
    else:
        below = ["second"] if cell.startswith("continued") else ["first", "second"]
        model = peft.PeftModel.from_pretrained(merged_by_hand(trained, below), output)
    torch.testing.assert_close(
        logp_of_rows(model, trained / "probe"), torch.load(trained / cell / "probe.pt"), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("cell", CELLS)
def test_the_manifest_carries_base_and_chain(trained: Path, cell: str) -> None:
    manifest = json.loads((trained / cell / "output" / "manifest.json").read_text())
    assert manifest["base"]["sha256"] == model_digest(trained / "model")
    below = ["second"] if cell.startswith("continued") else ["first", "second"]
    assert [each["uri"] for each in manifest["adapters"]] == [f"pvc://runs/{name}" for name in below]
    digests = [digest_of(adapter_files(trained / name)) for name in below]
    assert [each["sha256"] for each in manifest["adapters"]] == digests


def test_the_adapter_alone_is_put_on_no_bare_base(trained: Path) -> None:
    """It would load and say nonsense."""
    settings = json.loads((trained / "chain" / "output" / "adapter_config.json").read_text())
    assert "2 adapters merged" in settings["base_model_name_or_path"]
    with pytest.raises((OSError, ValueError)):
        peft.AutoPeftModelForCausalLM.from_pretrained(trained / "chain" / "output")


def test_base_and_parents_are_not_changed(trained: Path, tmp_path: Path) -> None:
    check_unchanged(trained, tmp_path)


def test_the_continued_adapter_keeps_its_own_settings(trained: Path) -> None:
    before, after = (
        json.loads((trained / name / "adapter_config.json").read_text()) for name in ("first", "continued/output")
    )
    for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
        assert after[name] == before[name]
    counts = json.loads((trained / "continued" / "counts.json").read_text())
    assert counts["trainable"] == 2 * 3 * (32 + 32 + 64 + 32)
