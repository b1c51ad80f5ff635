"""Whole curves: TRL's trainers and our real worker from the same weights, the data set as one batch, for 20 steps.

Where the first step is the same and the rest is not, it is the optimizer, the schedule, clipping, or a gradient that
was left over. Ours cuts the batch into micro-batches, TRL's does not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import parity_kit as kit
import parity_trl as trl
import pytest
from parity_kit import TRL, one_thread  # noqa: F401
from trainer_kit import call, make_config, prepare, start_ranks

from posttrain_trainer.tokenset import Example

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's own
PAIRS = kit.pairs(8)
STEPS = 20
TOLERANCES = {"loss": 1e-5, "grad_norm": 1e-4, "learning_rate": 1e-12}
"""Relative: the rounding of one step's sums, carried through twenty (found: 1e-6 in the loss). A gradient shrinks as
the loss falls, and keeps the weights' error: ten times as much."""
OPTIMIZERS = {
    "SGD": ({"optim": "sgd", "weight_decay": 0.0, "learning_rate": 0.05}, {"learning_rate": 0.05}),
    "AdamW": (
        {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 2e-3, "adam_beta2": 0.95},
        {"learning_rate": 2e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8},
    ),
}
STAGES = ("SFT", "Preference", "RewardModel")
CELLS = [f"{optimizer}-{stage}" for optimizer in OPTIMIZERS for stage in STAGES]


def _plain(example: Example) -> tuple[list[int], list[int]]:
    return example.tokens.tolist(), example.mask.tolist()


def _rows(stage: str) -> list[Any]:
    if stage == "SFT":
        return [_plain(kit.example(each.prompt, each.chosen)) for each in PAIRS]
    answers = [[_plain(example) for example in row.examples] for row in kit.pair_rows(PAIRS)]
    if stage == "Preference":
        return [tuple(both) for both in answers]
    return [(*both, each.margin) for both, each in zip(answers, PAIRS, strict=True)]


def _model(stage: str) -> Any:
    return kit.classifier(0) if stage == "RewardModel" else kit.language_model(0)


def _ours(folder: Path) -> Any:
    """Starts a worker that runs all cells; their lines come to lie in `folder`/<cell>/lines.json."""
    for cell in CELLS:
        optimizer, stage = cell.split("-")
        training = {
            "max_steps": STEPS,
            "batch_size": len(PAIRS),
            "tokens_per_micro_batch": 60,
            "schedule": "Linear",
            "warmup_steps": 0,
            "min_learning_rate_ratio": 0.0,
            "max_grad_norm": 1.0,
            **OPTIMIZERS[optimizer][1],
        }
        changes = {f"training__{name}": value for name, value in training.items()}
        if stage == "Preference":
            changes |= {"algorithm": "DPO", "preference__beta": 0.2}
        config = make_config(folder / cell, stage=stage, reward_model__centering=0.01, **changes)
        _model(stage).save_pretrained(folder / cell / "model")
        kit.tokenizer().save_pretrained(folder / cell / "model")
        prepare(config, _rows(stage))
        (folder / cell / "max_logits").write_text(str(2**20))
    return start_ranks(call, ("cells", str(folder), CELLS, str(folder / "done")), 1, folder / "logs")


def _theirs(cell: str, folder: Path) -> list[dict[str, float]]:
    optimizer, stage = cell.split("-")
    given = {
        "max_steps": STEPS,
        "logging_steps": 1,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        **OPTIMIZERS[optimizer][0],
    }
    model = _model(stage)
    if stage == "SFT":
        trainer = trl.sft(model, PAIRS, folder, **given)
    elif stage == "Preference":
        trainer = trl.dpo(model, _model(stage), PAIRS, folder, beta=0.2, **given)
    else:
        trainer = trl.reward(model, PAIRS, folder, margin=True, center_rewards_coefficient=0.01, **given)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Any], list[Any]]]:
    folder = tmp_path_factory.mktemp("curves")
    running = _ours(folder)
    theirs = {cell: _theirs(cell, folder / cell / "trl") for cell in CELLS}  # while ours runs
    assert running.wait() == [0], running.output()
    return {cell: (json.loads((folder / cell / "lines.json").read_text()), theirs[cell]) for cell in CELLS}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell}, {TRL}")
def test_the_curves_follow_each_other(cell: str, curves: Any) -> None:
    ours, theirs = curves[cell]
    assert len(ours) == len(theirs) == STEPS
    for name, tolerance in TOLERANCES.items():
        found, expected = ([float(line[name]) for line in lines] for lines in (ours, theirs))
        np.testing.assert_allclose(found, expected, rtol=tolerance, err_msg=name)
    assert ours[-1]["loss"] < 0.9 * ours[0]["loss"]  # it learned: the curve is not flat
