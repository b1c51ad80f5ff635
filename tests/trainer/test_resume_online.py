"""Stage RL, kill -9 in a rollout, in a reward, between two updates and in a save: the next attempt ends with the same
weights to the bit and the same lines, samples included.

What a step carries to the next one is in the checkpoint: the critic, the KL coefficient that adapts, and the place in
the order of prompts, which dynamic sampling moves by more than a step's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import resume_jobs
from online_kit import ADAPTIVE, DYNAMIC, online_config, online_job, samples
from trainer_kit import exported, make_model, start_ranks, steady_lines

STEPS, EVERY = 4, 2
WAIT = 600
pytestmark = pytest.mark.timeout(2 * WAIT)  # on a busy machine; alone it is done in a minute
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["all-linear"]}
SHARED = {"critic": {"learning_rate": 0.02, "shared": True, "warmup_steps": 1}, "tuning": "LoRA", "lora": LORA}
# algorithm, what is set, ZeRO stage, ranks, where it is killed, in which step
CELLS: dict[str, tuple[str, dict[str, Any], int, int, str, int]] = {
    "grpo-rollout": ("GRPO", DYNAMIC, 0, 1, "rollout", 3),
    "grpo-reward": ("GRPO", {"tuning": "LoRA", "lora": LORA}, 2, 2, "reward", 4),
    "grpo-save": ("GRPO", DYNAMIC, 0, 1, "commit", 4),
    "rloo-update": ("RLOO", {}, 3, 2, "optimizer", 3),
    "ppo-save": ("PPO", ADAPTIVE, 2, 2, "DeepSpeed", 4),
    "ppo-update": ("PPO", ADAPTIVE, 0, 1, "applied", 4),
    "shared-scoring": ("PPO", {**ADAPTIVE, **SHARED}, 3, 1, "forward", 3),
    "shared-commit": ("PPO", SHARED, 2, 2, "commit", 2),
}


def _make(folder: Path, model: Path, name: str) -> None:
    algorithm, changes, zero, ranks, _, _ = CELLS[name]
    online_job(
        folder,
        model,
        algorithm,
        evaluation_rows=3,
        evaluation={"every_steps": EVERY, "metric": "eval_reward", "goal": "Maximize"},
        zero_stage=zero,
        checkpoint__every_steps=EVERY,
        topology__processes_per_node=ranks,
        training__max_steps=STEPS,
        **changes,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `whole/<cell>`, never disturbed, and `broken/<cell>`: killed once, resumed once."""
    root = tmp_path_factory.mktemp("resume-online")
    make_model(root / "model")
    for name in CELLS:
        for kind in ("whole", "broken"):
            _make(root / kind / name, root / "model", name)
    for name, (_, _, _, ranks, place, step) in CELLS.items():
        folder = root / "broken" / name
        codes = start_ranks(resume_jobs.killed, (place, step, 0, [str(folder)]), ranks, folder / "logs-1").wait()
        (folder / "codes.json").write_text(json.dumps(codes))
    for ranks in (1, 2):
        names = [name for name, cell in CELLS.items() if cell[3] == ranks]
        for number, kind in ((1, "whole"), (2, "broken")):
            folders = [str(root / kind / name) for name in names]
            running = start_ranks(resume_jobs.attempt, (number, folders), ranks, root / f"{kind}-{ranks}")
            assert running.wait(WAIT) == [0] * ranks, running.output()
    return root


@pytest.mark.parametrize("name", CELLS)
def test_killed_and_resumed_is_bit_equal(runs: Path, name: str) -> None:
    whole, broken = runs / "whole" / name, runs / "broken" / name
    ends = [json.loads((folder / "work" / "ends" / "rank-0.json").read_text()) for folder in (whole, broken)]
    assert all("success" in end for end in ends), ends
    assert json.loads((broken / "codes.json").read_text())[0] == -9
    configs = [online_config(folder) for folder in (whole, broken)]
    weights, lines = [exported(config) for config in configs], [steady_lines(config) for config in configs]
    assert weights[0]
    assert weights[0] == weights[1]
    assert [line["step"] for line in lines[0]] == list(range(1, STEPS + 1))
    assert lines[0] == lines[1]
    assert samples(whole) == samples(broken)
    log = (runs / f"broken-{CELLS[name][3]}" / "rank-0.log").read_text()
    assert f"resumed from {broken}/" in log


def test_what_is_carried_moves(runs: Path) -> None:
    """Or its loss would not be seen: the place of the next prompt, and the KL coefficient."""
    states = {
        name: json.loads((runs / "whole" / name / "checkpoints" / f"step-{STEPS:06d}" / "trainer.json").read_text())
        for name in CELLS
    }
    carried = {name: state["state"]["online"] for name, state in states.items()}
    assert carried["grpo-rollout"]["cursor"] > carried["grpo-reward"]["cursor"] == STEPS * 4
    assert carried["ppo-save"]["kl_coefficient"] != carried["shared-commit"]["kl_coefficient"] == 0.05
