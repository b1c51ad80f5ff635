"""Small jobs of stage RL: prompts of numbered words, and rewards that need no process of their own but one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from trainer_kit import VOCABULARY, make_config, make_model, prepare

from posttrain_api.records import DataReport
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.tokenset import Example, TokenSetWriter

TWENTIES = {"name": "twenties", "regex": {"pattern": "t2"}}
"""1 where the completion has one of the words t2, t20 … t29."""
SHORT = {"name": "short", "weight": 0.5, "length": {"max_tokens": 4}}
DYNAMIC = {"grpo__max_refills": 3}
ADAPTIVE = {"ppo": {"epochs": 2, "adaptive_kl": {"target": 0.5, "horizon": 20}}}
"""Each makes a step carry something to the next one: the place in the order of prompts, the KL coefficient."""


def prompts(count: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    drawn = random.Random(seed)
    return [[drawn.randrange(3, VOCABULARY) for _ in range(drawn.randint(1, longest))] for _ in range(count)]


def write_prompts(folder: Path, given: list[list[int]]) -> None:
    with TokenSetWriter(folder, records=True) as writer:
        for number, tokens in enumerate(given):
            nothing = np.zeros(len(tokens), dtype=np.uint8)
            writer.append(Example(np.asarray(tokens, np.int32), nothing), record=json.dumps({"number": number}))


def online_config(run_dir: Path, algorithm: str = "GRPO", **changes: Any) -> TrainerConfig:
    """3 steps of 4 prompts, two updates each."""
    defaults: dict[str, Any] = {
        "stage": "RL",
        "algorithm": algorithm,
        "training__max_steps": 3,
        "training__batch_size": 2,
        "training__tokens_per_micro_batch": 64,
        "training__schedule": "Constant",
        "training__warmup_steps": 0,
        "training__max_grad_norm": 0.0,
        "training__weight_decay": 0.0,
        "training__learning_rate": 0.05,
        "rollout": {"engine": "Generate", "batch_size": 4, "max_new_tokens": 8},
        "rewards": [TWENTIES, SHORT],
        "grpo__group_size": 3,
        "rloo__group_size": 3,
        "ppo__epochs": 2,
    }
    if algorithm == "PPO":
        defaults["critic"] = {"learning_rate": 0.05}
    return make_config(run_dir, **{**defaults, **changes})


def prepare_online(config: TrainerConfig, model: Path, evaluation: int = 0, count: int = 10, **changes: Any) -> None:
    """Writes `<run_dir>/prepared` as the real preparation would."""
    run_dir = Path(config.run_dir)
    folder = run_dir / "prepared"
    known = {
        "model_dir": str(model),
        "stop_tokens": (1,),
        "data_report": DataReport(rows=count, used=count, tokens=0),
        "train_dir": str(folder / "train"),
        "eval_dir": str(folder / "eval") if evaluation else None,
    }
    prepare(config, [], **{**known, **changes})
    write_prompts(folder / "train", prompts(count))
    if evaluation:
        write_prompts(folder / "eval", prompts(evaluation, seed=1))


def online_job(run_dir: Path, model: Path, algorithm: str = "GRPO", **changes: Any) -> TrainerConfig:
    """A prepared job."""
    if not model.exists():
        make_model(model)
    evaluation = changes.pop("evaluation_rows", 0)
    config = online_config(run_dir, algorithm, **changes)
    prepare_online(config, model, evaluation)
    return config


def samples(run_dir: Path) -> list[dict[str, Any]]:
    """What completions.jsonl shows."""
    return [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
