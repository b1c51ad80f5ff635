"""The learning rate by step: warm-up without a lost step, the decays by hand, the floor."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from posttrain_trainer.schedule import Schedule


def test_cosine_by_hand() -> None:
    schedule = Schedule("Cosine", 2.0, warmup_steps=3, total_steps=11, min_ratio=0.1)
    rates = [schedule.rate(step) for step in range(11)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[7] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[10] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 7 / 8)) / 2))
    assert all(first >= second for first, second in pairwise(rates[3:]))
    assert schedule.rate(11) == pytest.approx(0.2)


def test_linear_by_hand() -> None:
    schedule = Schedule("Linear", 1.0, warmup_steps=0, total_steps=4, min_ratio=0.0)
    assert [schedule.rate(step) for step in range(4)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_constant() -> None:
    schedule = Schedule("Constant", 1.0, warmup_steps=1, total_steps=4, min_ratio=0.0)
    assert [schedule.rate(step) for step in range(4)] == pytest.approx([0.5, 1.0, 1.0, 1.0])


def test_no_rate_is_zero_even_where_warm_up_is_everything() -> None:
    schedule = Schedule("Cosine", 1.0, warmup_steps=5, total_steps=5, min_ratio=0.0)
    assert all(schedule.rate(step) > 0 for step in range(5))
