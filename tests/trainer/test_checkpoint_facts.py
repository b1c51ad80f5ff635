"""What a checkpoint and a job must have in common, and that a difference is named with both values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import make_config

from posttrain_api.records import DataReport, Resolved
from posttrain_trainer.checkpoint_facts import Facts, differences, facts_of
from posttrain_trainer.engine_adopt import Written
from posttrain_trainer.prepared import Prepared, PreparedAdapter

PREPARED = Prepared(
    **dict.fromkeys(("config_digest", "model_dir", "tokenizer_dir", "train_dir"), "x"),
    model_digest="sha256:m",
    data_digest="sha256:d",
    data_report=DataReport(rows=1, used=1, tokens=1),
    resolved=Resolved(zero_stage=0, warmup_steps=0, total_steps=1, precision="FP32", attention="SDPA"),
)
SOURCE = {"uri": "pvc://data/train.jsonl", "path": "/data/train.jsonl"}
PREFERENCE = {"stage": "Preference", "algorithm": "DPO"}
PPO = {"stage": "RL", "algorithm": "PPO"}


def _facts(config: dict[str, Any], **prepared: Any) -> Facts:
    return facts_of(make_config(Path("/run"), **config), PREPARED.model_copy(update=prepared), 1)


def _adapter(digest: str) -> tuple[PreparedAdapter, ...]:
    return (PreparedAdapter(dir="/a", digest=digest),)


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({"stage": "SFT"}, {"stage": "Pretrain"}, "stage is 'SFT' there and 'Pretrain' here"),
        (PREFERENCE, {**PREFERENCE, "algorithm": "IPO"}, "algorithm is 'DPO' there and 'IPO' here"),
        (PREFERENCE, {"reference_digest": "sha256:r"}, "reference digest is None there and 'sha256:r' here"),
        (
            {**PREFERENCE, "reference_adapters": _adapter("sha256:1")},
            {"reference_adapters": _adapter("sha256:2")},
            "reference adapters is 'sha256:1' there and 'sha256:2' here",
        ),
        (
            {"adapters": _adapter("sha256:1")},
            {"adapters": _adapter("sha256:2")},
            "model adapters is 'sha256:1' there and 'sha256:2' here",
        ),
        ({}, {"data__train": [{**SOURCE, "weight": 0.5}]}, "data.train[].weight is None there and '0.5' here"),
        (PPO, {"critic_digest": "sha256:c"}, "critic digest is None there and 'sha256:c' here"),
        (
            {**PPO, "critic_adapters": _adapter("sha256:1")},
            {"critic_adapters": _adapter("sha256:2")},
            "critic adapters is 'sha256:1' there and 'sha256:2' here",
        ),
        (PPO, {"critic__shared": True}, "critic.shared is 'False' there and 'True' here"),
        ({}, {"training__batch_size": 4}, "training.batchSize is 6 there and 4 here"),
        ({}, {"training__seed": 8}, "training.seed is 7 there and 8 here"),
        ({}, {"model_digest": "sha256:n"}, "model digest is 'sha256:m' there and 'sha256:n' here"),
        ({}, {"data_digest": "sha256:e"}, "data digest is 'sha256:d' there and 'sha256:e' here"),
    ],
)
def test_every_job_must_agree_on_it(theirs: dict[str, Any], ours: dict[str, Any], said: str) -> None:
    """`ours` is what differs from `theirs`."""
    for own in (True, False):
        assert differences(_made(theirs), _made({**theirs, **ours}), own) == [said]
        assert differences(_made(theirs), _made(theirs), own) == []


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (PREFERENCE, {"preference__beta": 0.5}, "preference.beta is 0.1 there and 0.5 here"),
        (PREFERENCE, {"preference__sft_weight": 1.0}, "preference.sftWeight is 0.0 there and 1.0 here"),
        (
            {"stage": "RewardModel"},
            {"reward_model__centering": 0.1},
            "rewardModel.centering is 0.0 there and 0.1 here",
        ),
        (PPO, {"ppo__lam": 0.9}, "ppo.lam is '0.95' there and '0.9' here"),
        (PPO, {"critic__warmup_steps": 3}, "critic.warmupSteps is 0 there and 3 here"),
        ({**PPO, "algorithm": "GRPO"}, {"grpo__beta": 0.04}, "grpo.beta is '0.0' there and '0.04' here"),
        (
            PPO,
            {"rewards": [{"name": "a"}]},
            'rewards is \'[]\' there and \'[{"name":"a","onError":"Fail","timeoutSeconds":30.0,"weight":1.0}]\' here',
        ),
    ],
)
def test_the_objective_may_change_in_a_new_job_only(config: dict[str, Any], change: dict[str, Any], said: str) -> None:
    there, here = _facts(config), _facts({**config, **change})
    assert differences(there, here, own=True) == [said]
    assert differences(there, here, own=False) == []


@pytest.mark.parametrize(
    ("changes", "ranks", "said"),
    [
        ({}, 2, "world size is 1 there and 2 here"),
        ({"deepspeed__overrides": {"a": 1}}, 1, "deepspeed.overrides is None there and \"[('a', 1)]\" here"),
    ],
)
def test_how_it_was_cut_may_change_in_a_new_job_only(changes: dict[str, Any], ranks: int, said: str) -> None:
    there, here = _facts({}), facts_of(make_config(Path("/run"), **changes), PREPARED, ranks)
    assert differences(there, here, own=True) == [said]
    assert differences(there, here, own=False) == []
    assert (there.written, here.written) == (Written(1, 0), Written(ranks, 0))


def test_a_checkpoint_that_counted_the_layout_to_the_shape_still_fits() -> None:
    now = _facts({})
    before = {"shape": {**now.shape, **now.layout}, "course": now.course}
    assert Facts.from_wire(before) == now
    assert Facts.from_wire(json.loads(json.dumps(vars(now)))) == now


def test_a_checkpoint_of_an_earlier_release_still_fits() -> None:
    """It does not have the facts of stages that it did not know."""
    now = _facts({})
    new = ("algorithm", "reference digest", "reference adapters", "model adapters")
    shape = {name: value for name, value in now.shape.items() if name not in new}
    layout = {name: value for name, value in now.layout.items() if name != "deepspeed.overrides"}
    before = Facts(shape, layout, now.course)
    assert differences(before, now, own=True) == []


def _made(changes: dict[str, Any]) -> Facts:
    prepared = {name: value for name, value in changes.items() if name in Prepared.model_fields}
    return _facts({name: value for name, value in changes.items() if name not in prepared}, **prepared)
