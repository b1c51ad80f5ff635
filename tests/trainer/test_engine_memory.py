"""What saves memory changes no update: gradient checkpointing, offloading to the host, the job's own DeepSpeed keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_kit import SGD, Run, assert_same, causal, plain_sgd, train_all
from trainer_kit import make_config, make_model, prepare, rows

from posttrain_api.reasons import Reason
from posttrain_api.records import Resolved
from posttrain_api.trainer import LoraConfig
from posttrain_trainer.engine_config import EngineSettings, deepspeed_config
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.lora import add_adapter
from posttrain_trainer.model import build_module
from posttrain_trainer.prepared import Prepared
from posttrain_trainer.scorer import causal_lm

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
OVERRIDES = {"zero_optimization": {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}}
OFFLOAD = {"deepspeed__offload_optimizer": True}
BOTH = {**OFFLOAD, "deepspeed__offload_parameters": True}
CELLS: dict[str, dict[str, Any]] = {
    **{f"again-z{zero}": {"training__gradient_checkpointing": True} for zero in (0, 2, 3)},
    **{f"lora-again-z{zero}": {"training__gradient_checkpointing": True} for zero in (2, 3)},
    **{f"host-z{zero}": OFFLOAD for zero in (1, 2, 3)},
    "parameters-z3": {"deepspeed__offload_parameters": True},
    "both-z3": BOTH,
    "lora-both-z3": BOTH,
    "keys-z2": {"deepspeed__overrides": OVERRIDES},
    "unknown-z2": {"deepspeed__overrides": {"zero_optimization": {"no_such_key": 1}}},
    "adam-z2": {},
    "adam-host-z2": OFFLOAD,
    "adam-both-z3": BOTH,
}


def _resolved(zero: int, again: bool) -> dict[str, Any]:
    values = {"zero_stage": zero, "warmup_steps": 0, "total_steps": 2, "precision": "FP32", "attention": "SDPA"}
    return {"resolved": Resolved(**values, gradient_checkpointing=again)}


def _make(root: Path, cell: str, changes: dict[str, Any]) -> tuple[Any, Prepared]:
    zero = int(cell[-1])
    if cell.startswith("lora"):
        changes = {**changes, "tuning": "LoRA", "lora": LORA}
    rate = {"training__learning_rate": 1e-2} if cell.startswith("adam") else {}
    config = make_config(root / cell, zero_stage=zero, **{**SGD, **rate, **changes})
    resolved = _resolved(zero, config.training.gradient_checkpointing is True)
    return config, prepare(config, rows(20), model_dir=str(root / "model"), **resolved)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    make_model(root / "model")
    for cell, changes in CELLS.items():
        _make(root, cell, changes)
    train_all(root, CELLS, 2)
    return root


@pytest.fixture(scope="module")
def expected(trained: Path) -> dict[str, Run]:
    full = make_config(trained / "again-z0", **SGD)
    lora = add_adapter(causal(trained / "model"), LoraConfig(**LORA), full.training.seed)
    return {"full": plain_sgd(causal(trained / "model"), full), "lora": plain_sgd(lora, full)}


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.startswith(("adam", "unknown"))])
def test_the_update_is_plain_torchs(trained: Path, expected: dict[str, Run], cell: str) -> None:
    failed = trained / cell / "failed.txt"
    assert not failed.exists(), failed.read_text()
    used = json.loads((trained / cell / "counts.json").read_text())["settings"]
    asked = {name.removeprefix("deepspeed__"): value for name, value in CELLS[cell].items() if "deepspeed" in name}
    assert {name: used[name] for name in asked} == asked
    assert_same(trained / cell, expected["lora" if cell.startswith("lora") else "full"])


def test_a_key_that_deepspeed_does_not_know_is_named(trained: Path) -> None:
    said = (trained / "unknown-z2" / "failed.txt").read_text()
    assert said.startswith("ImageIncompatible: deepspeed.overrides")
    assert "no_such_key" in said


@pytest.mark.parametrize("cell", ["adam-host-z2", "adam-both-z3"])
def test_adam_on_the_host_is_adam(trained: Path, cell: str) -> None:
    """Its moments are on the host; fp32 in another order moves a weight by 1e-6, where a whole step is 1e-2."""
    there, here = torch.load(trained / "adam-z2" / "weights.pt"), torch.load(trained / cell / "weights.pt")
    for name, value in there.items():
        torch.testing.assert_close(here[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cell", ["again-z0", "lora-again-z2"])
def test_every_layer_is_computed_again(tmp_path: Path, cell: str) -> None:
    make_model(tmp_path / "model")
    config, prepared = _make(tmp_path, cell, CELLS[cell])
    module = build_module(config, prepared)
    layers = causal_lm(module.lm).model.layers
    calls = []
    layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # the second time ends inside
    ids, index = torch.arange(3, 9)[None], torch.arange(5)
    module.train()
    logp, *_ = module(ids, None, index, ids[0, 1:])
    assert len(calls) == 1
    logp.sum().backward()
    assert len(calls) == 2
    assert all(layer.gradient_checkpointing for layer in layers)


def _settings(**changes: Any) -> EngineSettings:
    return EngineSettings(**{"zero_stage": 2, "max_grad_norm": 1.0, **changes})


def test_overrides_are_laid_over() -> None:
    config = deepspeed_config(_settings(overrides={**OVERRIDES, "wall_clock_breakdown": True}), 7)
    assert config["wall_clock_breakdown"] is True
    assert config["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": False,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 1000,
    }
    offloaded = {"zero_optimization": {"offload_optimizer": {"pin_memory": False}}}
    config = deepspeed_config(_settings(offload_optimizer=True, overrides=offloaded), 7)
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"overrides": {"gradient_clipping": 2}}, "deepspeed.overrides.gradient_clipping: it is the trainer's own"),
        ({"overrides": {"zero_optimization": {"stage": 1}}}, "deepspeed.overrides.zero_optimization.stage"),
        ({"overrides": {"elasticity": {}}}, "deepspeed.overrides.elasticity: DeepSpeed 0.19 has removed it"),
        ({"bf16": True, "zero_stage": 0}, "BF16 needs ZeRO 1"),
        ({"offload_parameters": True}, "deepspeed.offloadParameters needs ZeRO 3"),
        ({"offload_optimizer": True, "zero_stage": 0}, "deepspeed.offloadOptimizer needs ZeRO 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(TrainerFailure) as caught:
        deepspeed_config(_settings(**changes), 7)
    assert caught.value.reason is Reason.IMAGE_INCOMPATIBLE
    assert named in caught.value.message
