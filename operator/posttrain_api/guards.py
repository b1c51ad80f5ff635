"""What a trainer is told about guards: bounds of its own metrics, and what happens where one is left.

Part of TrainerConfig (trainer.py). The metrics' names are in measured.py.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain_api.base import Model

SAMPLER = "sampling/"
"""Metrics that hold what the sampling engine says against what the trainer says."""


class GuardRule(Model):
    """One bound: exactly one of `above` and `below`. It is broken where the metric is beyond it, or is no finite
    number, in `for_steps` steps running that measure it."""

    metric: str
    above: float | None = None
    below: float | None = None
    for_steps: int = Field(default=1, ge=1)
    action: Literal["Fail", "Warn", "Suspend"] = "Fail"


class GuardsConfig(Model):
    """A loss or gradient that is not finite always ends the job (NonFinite)."""

    rules: tuple[GuardRule, ...] = ()
