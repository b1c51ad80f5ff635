"""The law of the trainer for stage RL: the same prompts give the same samples, the same rewards and the same update,
however they are spread over ranks, sharded, cut or packed, and whichever engine samples them.

Pairwise cells of ranks × ZeRO stage × split × padded or packed × full or LoRA × rollout engine for each algorithm,
under SGD without clipping, each against the cell on one rank at ZeRO 0 in one padded micro-batch. Groups have three
samples, so that with two ranks every group is spread over both. Loss and gradient norm to 1e-6, the update to 1e-5 of
its length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from online_kit import online_job
from trainer_kit import call, make_model, run_ranks

pytestmark = pytest.mark.timeout(1200)  # on a busy machine; alone it is done in a minute
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
SPLITS = {"whole": 10**6, "cut": 60, "single": 1}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "GRPO": ("GRPO", {"grpo__beta": 0.1, "grpo__clip_high": 0.28}),
    "Sequence": ("GRPO", {"grpo__loss_aggregation": "Sequence", "grpo__importance_level": "Sequence"}),
    "DAPO": ("GRPO", {"grpo__max_refills": 2, "grpo__scale_rewards": "Batch", "grpo__mask_truncated": True}),
    "RLOO": ("RLOO", {}),
    "PPO": ("PPO", {}),
    "Shared": ("PPO", {"critic": {"learning_rate": 0.02, "shared": True, "warmup_steps": 1}}),
}
# settings, tuning, [ranks, ZeRO stage, split, layout, engine]; the first cell of each is what the others are held to
CELLS = {
    ("GRPO", "Full"): [
        (1, 0, "whole", "padded", "Generate"),
        (2, 1, "cut", "packed", "ContinuousBatching"),
        (2, 3, "single", "padded", "Generate"),
        (1, 2, "cut", "packed", "Generate"),
    ],
    ("GRPO", "LoRA"): [
        (1, 0, "whole", "padded", "Generate"),
        (2, 2, "cut", "padded", "Generate"),
        (2, 3, "whole", "packed", "Generate"),
    ],
    ("Sequence", "Full"): [
        (1, 0, "whole", "padded", "Generate"),
        (2, 0, "cut", "packed", "Generate"),
        (2, 3, "cut", "padded", "Generate"),
    ],
    ("DAPO", "Full"): [(1, 0, "whole", "padded", "Generate"), (2, 2, "cut", "packed", "Generate")],
    ("RLOO", "Full"): [
        (1, 0, "whole", "padded", "Generate"),
        (2, 2, "single", "packed", "Generate"),
        (1, 3, "cut", "padded", "ContinuousBatching"),
    ],
    ("PPO", "Full"): [
        (1, 0, "whole", "padded", "Generate"),
        (2, 0, "cut", "packed", "Generate"),
        (2, 2, "whole", "padded", "Generate"),
        (2, 3, "cut", "padded", "Generate"),
        (1, 1, "single", "packed", "Generate"),
    ],
    ("PPO", "LoRA"): [(1, 0, "whole", "padded", "Generate"), (2, 2, "cut", "packed", "Generate")],
    ("Shared", "NF4"): [(1, 0, "whole", "padded", "Generate"), (2, 1, "cut", "packed", "Generate")],
    ("Shared", "LoRA"): [
        (1, 0, "whole", "padded", "Generate"),
        (2, 2, "cut", "packed", "Generate"),
        (2, 3, "whole", "padded", "ContinuousBatching"),
    ],
}


def _name(kind: tuple[str, str], cell: tuple[Any, ...]) -> str:
    return "-".join(map(str, (*kind, *cell)))


ALL = {_name(kind, cell): (kind, cell) for kind, cells in CELLS.items() for cell in cells}
FIRST = {_name(kind, cells[0]) for kind, cells in CELLS.items()}


def _make(root: Path, name: str) -> None:
    (setting, tuning), (ranks, zero, split, layout, engine) = ALL[name]
    algorithm, changes = SETTINGS[setting]
    config = online_job(
        root / name,
        root / "model",
        algorithm,
        training__max_steps=2,
        training__tokens_per_micro_batch=SPLITS[split],
        tuning="Full" if tuning == "Full" else "LoRA",
        zero_stage=zero,
        topology__processes_per_node=ranks,
        evaluation_rows=5,
        rollout={"engine": engine, "batch_size": 4, "max_new_tokens": 8, "temperature": 0.9, "top_k": 40},
        **{"Full": {}, "LoRA": {"lora": LORA}, "NF4": {"lora": {**LORA, "quantization": "NF4"}}}[tuning],
        **changes,
    )
    assert config.topology.processes_per_node == ranks
    (root / name / "max_logits").write_text(str(2**26))
    if layout == "packed":
        (root / name / "packed").touch()
    if name in FIRST:
        (root / name / "keep_start").touch()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    torch.set_num_threads(1)
    make_model(folder / "model")
    for name in ALL:
        _make(folder, name)
    for ranks in (1, 2):
        names = [name for name, (_, cell) in ALL.items() if cell[0] == ranks]
        run_ranks(call, ("cells", str(folder), names, str(folder / f"done-{ranks}")), ranks, folder / f"logs-{ranks}")
    return folder


def _lines(root: Path, name: str) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = json.loads((root / name / "lines.json").read_text())
    return lines


def _weights(path: Path) -> torch.Tensor:
    weights = torch.load(path)
    return torch.cat([weights[each].flatten().double() for each in sorted(weights)])


@pytest.mark.parametrize("name", [name for name in ALL if name not in FIRST])
def test_update_depends_on_the_prompts_only(root: Path, name: str) -> None:
    kind, _ = ALL[name]
    first = _name(kind, CELLS[kind][0])
    for ours, theirs in zip(_lines(root, name), _lines(root, first), strict=True):
        unsteady = ("time/", "step_time", "tokens_per_second", "memory_bytes", "sampling/")
        for metric, expected in theirs.items():
            if metric.startswith(unsteady) or metric.endswith("/seconds"):
                continue
            exact = metric in ("loss", "grad_norm", "critic/loss", "critic/grad_norm")
            bound = 1e-6 if exact else 1e-5
            assert ours[metric] == pytest.approx(expected, rel=bound, abs=1e-6), metric
    start, theirs = (_weights(root / first / f"{which}.pt") for which in ("start", "weights"))
    ours = _weights(root / name / "weights.pt")
    assert torch.linalg.norm(ours - theirs) <= 1e-5 * torch.linalg.norm(theirs - start)


def test_something_was_learned(root: Path) -> None:
    """Or the law would hold of nothing."""
    for name in FIRST:
        norms = [line["grad_norm"] for line in _lines(root, name) if "grad_norm" in line]
        assert min(norms) > 1e-3, name
        assert "eval_reward" in _lines(root, name)[-1]
