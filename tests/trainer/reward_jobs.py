"""What forked ranks run in tests of rewards: several cases in one process group."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from reward_kit import completion, of_function, reward

from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import engine as engine_module
from posttrain_trainer import runtime as runtime_module
from posttrain_trainer.batching import Share
from posttrain_trainer.engine import FrozenEngine
from posttrain_trainer.engine_config import EngineSettings
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.loading import ModelFolder
from posttrain_trainer.packing import packs
from posttrain_trainer.rewards.base import Completion
from posttrain_trainer.rewards.model import RewardModel, reward_module
from posttrain_trainer.rewards.reward_set import RewardSet
from posttrain_trainer.runtime import Runtime

MINE = ([5, 1, 7, 2, 9], [])
"""Tokens of each completion by rank; the second has none."""


CASES = {"z0": (0, True), "z3": (3, False)}
"""ZeRO stage, packed."""


ON_RANK_1 = ("hangs", "nan", "short")
"""What a function does on the second rank alone."""


def completions_of(rank: int) -> list[Completion]:
    return [
        completion("text", [3 + (number + place) % 50 for place in range(length)], number, rank=rank)
        for number, length in enumerate(MINE[rank])
    ]


def scores(folder: str) -> None:
    """Each case's values or failure, by rank, in `<folder>/<case>-<rank>.json`."""
    engine_module.PERSISTENCE_THRESHOLD = 0
    root = Path(folder)
    config = TrainerConfig.model_validate_json((root / "config.json").read_text())
    runtime = runtime_module.start(config.topology, 0)
    model = reward(name="model", model={"source": {"uri": "pvc://m/r", "path": str(root / "model")}})
    length = reward(name="short", length={"max_tokens": 5})
    bad = of_function(root / "reward.py", "on_rank_1")
    for case, (zero, packed) in CASES.items():
        models = {"model": _model(root / "model", runtime, zero, packed)}
        _case(root, case, RewardSet([length, model], runtime.control.gather, models), completions_of(runtime.rank))
    models = {"model": _model(root / "model", runtime, 0, False)}
    both = RewardSet([bad, model], runtime.control.gather, models, 2)
    _case(root, "failed", both, [completion("text", rank=runtime.rank)])
    for name in ON_RANK_1:
        one = of_function(root / "reward.py", f"{name}_on_rank_1", timeout_seconds=3.0)
        _case(root, name, RewardSet([one], runtime.control.gather, {}, 2), [completion("text", rank=runtime.rank)])


def _model(folder: Path, runtime: Runtime, zero: int, packed: bool) -> RewardModel:
    module = reward_module("model", ModelFolder(folder), folder)
    assert not packed or packs(module, "SDPA", runtime.device)
    part = Share(runtime.rank, runtime.ranks, 16, whole=True, packed=packed)
    return RewardModel(FrozenEngine(module, EngineSettings(zero, 0.0)), runtime.control, part, runtime.device)


def _case(root: Path, name: str, rewards: RewardSet, given: list[Completion]) -> None:
    path = root / f"{name}-{torch.distributed.get_rank()}.json"
    try:
        path.write_text(json.dumps(rewards.score(given).values.tolist()))
    except TrainerFailure as failure:
        path.write_text(json.dumps([failure.reason, failure.message]))
    finally:
        rewards.close()
