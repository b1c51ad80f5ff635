"""rsLoRA and DoRA: the update of the engine at every ZeRO stage against plain torch with peft; their size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_kit import SGD, Run, assert_same, causal, plain_sgd, train_all
from trainer_kit import make_config, make_model, prepare, rows

from posttrain_api.trainer import LoraConfig
from posttrain_trainer.lora import adapter_size, add_adapter
from posttrain_trainer.model import count

KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["q_proj", "up_proj"], "rslora": True},
    "dora": {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"], "dora": True},
}
CELLS = [f"{kind}-z{zero}" for kind in KINDS for zero in range(4)]


@pytest.fixture(scope="module", params=[1, 2])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(f"kinds{request.param}")
    make_model(root / "model")
    for cell in CELLS:
        kind, zero = cell.split("-z")
        config = make_config(root / cell, tuning="LoRA", lora=KINDS[kind], zero_stage=int(zero), **SGD)
        prepare(config, rows(20), model_dir=str(root / "model"))
    train_all(root, CELLS, request.param)
    return root


@pytest.fixture(scope="module")
def expected(trained: Path) -> dict[str, Run]:
    found = {}
    for kind, lora in KINDS.items():
        config = make_config(trained / f"{kind}-z0", tuning="LoRA", lora=lora, **SGD)
        assert config.lora is not None
        found[kind] = plain_sgd(add_adapter(causal(trained / "model"), config.lora, config.training.seed), config)
    return found


@pytest.mark.parametrize("cell", CELLS)
def test_the_update_is_plain_torchs(trained: Path, expected: dict[str, Run], cell: str) -> None:
    failed = trained / cell / "failed.txt"
    assert not failed.exists(), failed.read_text()
    assert_same(trained / cell, expected[cell.split("-z")[0]])


def test_rslora_scales_by_the_root_of_the_rank(tmp_path: Path) -> None:
    make_model(tmp_path)
    adapted = add_adapter(causal(tmp_path), LoraConfig(**KINDS["rslora"]), seed=0)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    hidden = torch.randn(3, 32)
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    by_hand = hidden @ (layer.base_layer.weight + 8 / math.sqrt(4) * high @ low).T
    torch.testing.assert_close(layer(hidden), by_hand, rtol=1e-5, atol=1e-5)


def test_dora_learns_a_magnitude_per_row(tmp_path: Path) -> None:
    """m · (W + s·B·A) / ‖W + s·B·A‖ by row (Liu et al. 2024, eq. 5)."""
    make_model(tmp_path)
    adapted = add_adapter(causal(tmp_path), LoraConfig(**KINDS["dora"]), seed=0)
    assert count(adapted).trainable == adapter_size(adapted, 4, dora=True)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    hidden = torch.randn(3, 32)
    direction = layer.base_layer.weight + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    magnitude = layer.base_layer.weight.norm(dim=1)
    by_hand = hidden @ (magnitude / direction.norm(dim=1) * direction.T)
    torch.testing.assert_close(layer(hidden), by_hand, rtol=1e-5, atol=1e-5)
