"""Which engine a job gets."""

from __future__ import annotations

import pytest
from rollout_kit import ALONE, policy

from posttrain_trainer.rollout.choose import rollout_of
from posttrain_trainer.rollout.continuous import ContinuousBatching
from posttrain_trainer.rollout.generate import Generate


@pytest.mark.parametrize(
    ("name", "attention", "kind"),
    [
        ("Auto", "sdpa", Generate),
        ("Auto", "packed_sdpa", Generate),
        ("Auto", "flash_attention_2", ContinuousBatching),
        ("Generate", "flash_attention_2", Generate),
        ("ContinuousBatching", "sdpa", ContinuousBatching),
    ],
)
def test_the_engine_by_name_and_attention(name: str, attention: str, kind: type) -> None:
    engine = policy()
    engine.module.lm.config._attn_implementation_internal = attention
    assert type(rollout_of(name, engine, ALONE)) is kind
