"""Where the demo keeps its things and what it was asked for. Read by every step; decides nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "quickstart"
CHART = ROOT / "helm" / "posttrain-operator"
ENVIRONMENTS = ROOT / ".build" / "envs"
OPERATOR_NAMESPACE = "posttrain-system"
RELEASE = "posttrain-operator"
CLAIM = "quickstart"
BASE, TUNED = "arithmetic-base", "arithmetic-sft"
JOBS = (BASE, TUNED)
IMAGES = {"posttrain-operator:0.1.0": "operator", "posttrain-trainer:0.1.0": "trainer"}


class DemoError(Exception):
    """What a user can act on: the message says what happened and what to do next."""


@dataclass(frozen=True)
class Settings:
    """`state`: the cluster's folder; `keep`: leave the cluster running at the end."""

    state: Path
    keep: bool
    limit_seconds: int = 1800


def from_environment() -> Settings:
    """KEEP=1 keeps the cluster; DEMO_STATE names another state folder than `state/demo` of the repository."""
    state = Path(os.environ.get("DEMO_STATE") or ROOT / "state" / "demo")
    return Settings(state=state.resolve(), keep=os.environ.get("KEEP", "") not in ("", "0"))
