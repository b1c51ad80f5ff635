"""TrainingHealthy of a job that runs: what its trainer says of itself. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_operator.status.conditions import Condition
from posttrain_operator.status.verdict import HEALTHY


def health(progress: Mapping[str, Any]) -> Condition:
    """From status.progress: False while a guard warns."""
    warning = progress.get("warning")
    if not warning:
        return HEALTHY
    return Condition("False", str(warning["reason"]), str(warning["message"]))
