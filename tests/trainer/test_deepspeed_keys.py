"""Which DeepSpeed keys a job may not set; the list of removed ones is DeepSpeed's own."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain_api.deepspeed_keys import FREE, OWNED, REMOVED, refused_keys


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
        ({"stage": 3}, ["stage"]),
        ({"bfloat16": {"enabled": True}, "zero_optimization": {"anything": 1}}, ["bfloat16"]),
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


class _Read(dict[str, Any]):
    """A configuration that keeps the names it was asked for; its copy keeps them in the same place."""

    def __init__(self, values: dict[str, Any], asked: set[str]) -> None:
        super().__init__(values)
        self.asked = asked

    def __copy__(self) -> _Read:
        return _Read(dict(self), self.asked)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def test_free_keys_are_read_by_this_deepspeed() -> None:
    """Whatever else it reads is refused: owned, removed, or of a part of DeepSpeed that this trainer does not use."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()
    DeepSpeedConfig(_Read({"train_micro_batch_size_per_gpu": 1}, asked))
    assert asked >= FREE
    unused = {"aio", "autotuning", "bfloat16", "datastates_ckpt", "seq_parallel_communication_data_type"}
    unused |= {"use_data_before_expert_parallelism", "weight_quantization"}
    assert asked - FREE - set(OWNED) - set(REMOVED) == unused


def test_a_key_that_nobody_reads_is_named_with_the_nearest() -> None:
    assert refused_keys({"wall_clock_breakdwn": True})["wall_clock_breakdwn"].endswith(
        "did you mean wall_clock_breakdown?"
    )
    assert "did you mean bf16?" in refused_keys({"bfloat16": {"enabled": True}})["bfloat16"]
    assert "known are comet, comms_logger" in refused_keys({"xyz": 1})["xyz"]
