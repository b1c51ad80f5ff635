"""The names that guards may use are the names that a job writes: every stage, every algorithm, with and without what
is optional. And the sampler's difference is measured in a step with one update too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import resume_jobs
from online_kit import online_config, online_job
from trainer_kit import make_config, make_model, pairs, prepare, rows, start_ranks

from posttrain_api.measured import EVALUATION, SAMPLING_DIFFERENCE, measured
from posttrain_api.places import Source
from posttrain_api.trainer import DataSource, TrainerConfig

LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": ["all-linear"]}
ONE_UPDATE = {"rollout__batch_size": 2}
PAIRED = {"stage": "Preference", "algorithm": "DPO"}
OFFLINE: dict[str, tuple[Any, dict[str, Any]]] = {
    "sft": (rows, {}),
    "pretrain": (rows, {"stage": "Pretrain"}),
    "dpo": (pairs, {**PAIRED, "preference__sft_weight": 0.1}),
    "simpo": (pairs, {**PAIRED, "algorithm": "SimPO"}),
    "reward": (pairs, {"stage": "RewardModel"}),
    "centred": (pairs, {"stage": "RewardModel", "reward_model__centering": 0.1}),
}
ONLINE: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("GRPO", {}),
    "grpo-one": ("GRPO", ONE_UPDATE),
    "grpo-all": ("GRPO", {"grpo__beta": 0.1, "grpo__sampler_correction": "TIS"}),
    "rloo": ("RLOO", {}),
    "rloo-one": ("RLOO", {**ONE_UPDATE, "rloo__kl_coefficient": 0.0}),
    "ppo": ("PPO", {"critic": {"learning_rate": 0.05, "warmup_steps": 1}}),
    "ppo-shared": ("PPO", {"tuning": "LoRA", "lora": LORA, "critic": {"learning_rate": 0.05, "shared": True}}),
}
HELD_OUT = (DataSource(**Source(uri="pvc://data/eval.jsonl", path="/nowhere").model_dump()).to_wire(),)
pytestmark = pytest.mark.timeout(900)  # on a busy machine; alone it is done in half a minute


def _changes(changes: dict[str, Any]) -> dict[str, Any]:
    return {"training__max_steps": 2, "data__eval": HELD_OUT, "zero_stage": 2, **changes}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainerConfig]:
    """Two steps of each job, then an evaluation."""
    root = tmp_path_factory.mktemp("measured")
    model = root / "model"
    make_model(model)
    found = {}
    for name, (made, changes) in OFFLINE.items():
        found[name] = make_config(root / name, **_changes(changes))
        prepare(found[name], made(12), made(3, seed=1), model_dir=str(model))
    for name, (algorithm, changes) in ONLINE.items():
        found[name] = online_config(root / name, algorithm, **_changes(changes))
        online_job(root / name, model, algorithm, evaluation_rows=3, **_changes(changes))
    folders = [str(root / name) for name in found]
    running = start_ranks(resume_jobs.attempt, (1, folders), 1, root / "logs")
    assert running.wait(600) == [0], running.output()
    return found


def _lines(config: TrainerConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]


def _apart(name: str) -> bool:
    """What a step has and no guard may name."""
    return name.startswith("time/") or name in ("step", "skipped_steps", "sampling/sampling_logp_difference/max")


@pytest.mark.parametrize("name", [*OFFLINE, *ONLINE])
def test_a_job_measures_what_it_is_said_to_measure(configs: dict[str, TrainerConfig], name: str) -> None:
    known = measured(configs[name])
    last = _lines(configs[name])[-1]
    assert {each for each in last if not _apart(each)} == set(known)
    first = [each for each in known if not each.startswith(EVALUATION)]
    if name != "ppo":  # whose policy waits in the first step
        assert set(first) <= _lines(configs[name])[0].keys()


@pytest.mark.parametrize("name", ONLINE)
def test_the_sampler_says_what_the_trainer_says(configs: dict[str, TrainerConfig], name: str) -> None:
    found = [line[SAMPLING_DIFFERENCE] for line in _lines(configs[name]) if SAMPLING_DIFFERENCE in line]
    assert len(found) == 2
    assert all(0 < each < 1e-5 for each in found), "two kernels round differently, and no more"
