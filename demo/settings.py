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
SHORT = ("01-pretrain", "02-sft-lora")
FILES = {
    "01-pretrain": BASE,
    "02-sft-lora": TUNED,
    "03-reward": "arithmetic-reward",
    "04-dpo": "arithmetic-dpo",
    "05-grpo": "arithmetic-grpo",
    "06-ppo": "arithmetic-ppo",
}
"""File in the example → its job, in order."""
RAISES = {"arithmetic-dpo": 0.05, "arithmetic-grpo": 0.15, "arithmetic-ppo": 0.15}
"""By how much more than this a job must raise the sampled accuracy of the fine-tuned model."""
SCORES = ("arithmetic-reward",)
"""Jobs whose model answers nothing: there is no accuracy to measure."""
IMAGES = {"posttrain-operator:0.1.0": "operator", "posttrain-trainer:0.1.0": "trainer"}


class DemoError(Exception):
    """What a user can act on: the message says what happened and what to do next."""


@dataclass(frozen=True)
class Settings:
    """`state`: the cluster's folder; `keep`: leave the cluster running at the end; `files`: the example's, without
    `.yaml`."""

    state: Path
    keep: bool
    files: tuple[str, ...] = tuple(FILES)
    limit_seconds: int = 1800

    @property
    def jobs(self) -> tuple[str, ...]:
        """Names of the jobs, in order."""
        return tuple(FILES[file] for file in self.files)

    @property
    def whole(self) -> bool:
        """All stages."""
        return self.files == tuple(FILES)


def from_environment() -> Settings:
    """KEEP=1 keeps the cluster; STAGES=sft ends after fine-tuning; DEMO_STATE names another state folder than
    `state/demo` of the repository. DemoError for other stages."""
    state = Path(os.environ.get("DEMO_STATE") or ROOT / "state" / "demo")
    stages = os.environ.get("STAGES") or "all"
    if stages not in ("all", "sft"):
        raise DemoError(f"STAGES is {stages!r}: write all (six jobs) or sft (two)")
    files = SHORT if stages == "sft" else tuple(FILES)
    return Settings(state=state.resolve(), keep=os.environ.get("KEEP", "") not in ("", "0"), files=files)
