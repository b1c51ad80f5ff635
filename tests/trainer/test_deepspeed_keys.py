"""Which DeepSpeed keys a job may not set; the list of removed ones is DeepSpeed's own."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain_api.deepspeed_keys import OWNED, REMOVED, refused_keys


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ({}, []),
        ({"zero_optimization": {"reduce_bucket_size": 5, "stage3_max_live_parameters": 7}}, []),
        ({"wall_clock_breakdown": True, "zero_optimization": {"offload_optimizer": {"pin_memory": False}}}, []),
        ({"gradient_clipping": 2.0, "optimizer": {"type": "Adam"}}, ["gradient_clipping", "optimizer"]),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, ["zero_optimization.stage"]),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["zero_optimization.offload_param.device"]),
        ({"zero_optimization": True}, ["zero_optimization"]),
        ({"zero_optimization": {"offload_param": None}}, ["zero_optimization.offload_param"]),
        ({"elasticity": {"enabled": True}}, ["elasticity"]),
        ({"zero_optimization": {"mics_shard_size": 8}}, ["zero_optimization.mics_shard_size"]),
        ({"stage": 3}, []),
    ],
)
def test_refused_keys(overrides: dict[str, Any], refused: list[str]) -> None:
    found = refused_keys(overrides)
    assert list(found) == refused
    for path, why in found.items():
        assert why.startswith("it is the trainer's own") is (path in OWNED)


def test_removed_keys_are_those_of_this_deepspeed() -> None:
    from deepspeed.runtime import config

    theirs = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    theirs |= {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}
    assert set(REMOVED) == theirs
