"""Which engine a job gets."""

from __future__ import annotations

import pytest
from rollout_kit import ALONE, policy

from posttrain_trainer.rollout.choose import rollout_of
from posttrain_trainer.rollout.continuous import ContinuousBatching
from posttrain_trainer.rollout.generate import Generate


@pytest.mark.parametrize(
    ("name", "kind"), [("Auto", Generate), ("Generate", Generate), ("ContinuousBatching", ContinuousBatching)]
)
def test_the_engine_by_name(name: str, kind: type) -> None:
    assert type(rollout_of(name, policy(), ALONE)) is kind
