"""What is exported is what was trained, to the bit, as plain transformers and peft read it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from trainer_kit import Shape, call, make_config, make_model, prepare, rows, run_ranks

from posttrain_api.base import canonical_json
from posttrain_trainer.checkpoint_files import file_digest

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}


def _train(root: Path, ranks: int, zero: int, tied: bool = False, **changes: Any) -> Path:
    run_dir = root / "run"
    config = make_config(run_dir, zero_stage=zero, training__max_steps=2, **changes)
    make_model(run_dir / "model", Shape(tied=tied))
    prepare(config, rows(12))
    run_ranks(call, ("train_and_export", str(run_dir)), ranks, root / "logs")
    return run_dir


def _plain(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _check_manifest(run_dir: Path, kind: str) -> None:
    folder = run_dir / "output"
    manifest = json.loads((folder / "manifest.json").read_text())
    output = json.loads((run_dir / "output.json").read_text())
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    for name, entry in manifest["files"].items():
        assert entry == {"size": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
    digests = canonical_json({name: entry["sha256"] for name, entry in manifest["files"].items()})
    assert manifest["sha256"] == output["digest"] == "sha256:" + hashlib.sha256(digests.encode()).hexdigest()
    assert manifest["format"] == output["format"] == kind
    assert manifest["base"]["uri"] == "pvc://models/tiny"
    assert output["sizeBytes"] == sum(entry["size"] for entry in manifest["files"].values())
    assert output["uri"] == "pvc://runs/tiny/u1/output"
    assert not list(run_dir.glob("output.tmp*"))


@pytest.mark.parametrize(("ranks", "zero", "tied"), [(1, 0, False), (2, 2, True), (2, 3, False), (1, 3, True)])
def test_full_model_reloads_bit_equal(tmp_path: Path, ranks: int, zero: int, tied: bool) -> None:
    run_dir = _train(tmp_path, ranks, zero, tied)
    live = torch.load(run_dir / "live.pt")
    model = _plain(run_dir / "output")
    reloaded = dict(model.named_parameters())
    assert set(reloaded) == set(live)
    start = dict(_plain(run_dir / "model").named_parameters())
    for name, value in live.items():
        assert torch.equal(reloaded[name], value), name
        assert not torch.equal(start[name], value), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir / "output")
    assert tokenizer("t5 t9")["input_ids"] == [5, 9]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (run_dir / "output" / name).read_bytes() == (run_dir / "prepared" / "tokenizer" / name).read_bytes()
    _check_manifest(run_dir, "safetensors")


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 2), (2, 3)])
def test_adapter_reloads_bit_equal(tmp_path: Path, ranks: int, zero: int) -> None:
    run_dir = _train(tmp_path, ranks, zero, tuning="LoRA", lora=LORA)
    live = torch.load(run_dir / "live.pt")
    base = _plain(run_dir / "model")
    for name, value in base.named_parameters():  # nothing of the base has moved
        wrapped = "base_model.model." + name
        parent, _, last = wrapped.rpartition(".")
        assert torch.equal(live.get(wrapped, live.get(f"{parent}.base_layer.{last}")), value), name
    adapted = peft.PeftModel.from_pretrained(base, run_dir / "output")
    reloaded = dict(adapted.named_parameters())
    learned = [name for name in live if "lora_" in name]
    assert learned
    for name in learned:
        assert torch.equal(reloaded[name], live[name]), name
        assert float(live[name].abs().max()) > 0
    automatic = peft.AutoPeftModelForCausalLM.from_pretrained(run_dir / "output", dtype=torch.float32)
    ids = torch.arange(9)[None]
    assert torch.equal(automatic(input_ids=ids).logits, adapted(input_ids=ids).logits)
    _check_manifest(run_dir, "peft")


def test_merged_model_computes_as_base_and_adapter(tmp_path: Path) -> None:
    run_dir = _train(tmp_path, 1, 0, tuning="LoRA", lora=LORA, merge_adapter=True, training__learning_rate=0.1)
    merged = _plain(run_dir / "output")
    base = _plain(run_dir / "model")
    ids = torch.arange(9)[None]
    before = base(input_ids=ids).logits
    adapted = peft.PeftModel.from_pretrained(base, run_dir / "output" / "adapter")
    expected = adapted(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert float((expected - before).detach().abs().max()) > 1e-2
    name = "model.layers.0.mlp.up_proj"
    layer = adapted.base_model.model.get_submodule(name)
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    by_hand = layer.base_layer.weight + (8.0 / 4) * high @ low
    torch.testing.assert_close(merged.get_submodule(name).weight, by_hand, rtol=1e-6, atol=1e-6)
    _check_manifest(run_dir, "safetensors")
