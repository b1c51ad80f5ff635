"""Guards: bounds of the trainer's own metrics, and what happens where training leaves them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain_api.spec.fields import SpecModel, optional, required
from posttrain_api.spec.training import MAX_STEPS

MAX_RULES = 16
BOUND = 1e15


class GuardRule(SpecModel):
    """One bound of one metric: exactly one of above and below."""

    metric: str = required(
        "The metric, by its name in metrics.jsonl; a name with eval_ is looked at where it is evaluated",
        example="kl",
        min_length=1,
        max_length=64,
    )
    above: float | None = optional(
        "The rule is broken where the metric is more than this, or is no finite number",
        default="none; one of above and below is needed",
        example=0.5,
        ge=-BOUND,
        le=BOUND,
    )
    below: float | None = optional(
        "The rule is broken where the metric is less than this, or is no finite number",
        default="none; one of above and below is needed",
        example=0.01,
        ge=-BOUND,
        le=BOUND,
    )
    for_steps: int | None = optional(
        "Nothing happens before it is broken in so many steps running that measure the metric",
        unit="steps",
        default="1",
        example=3,
        ge=1,
        le=MAX_STEPS,
    )
    action: Literal["Fail", "Warn", "Suspend"] | None = optional(
        "Fail: the job ends with GuardTripped, and the last checkpoint from before the first broken step is kept. "
        "Warn: TrainingHealthy is False while it is broken, and training goes on. Suspend: the state is saved and the "
        "job is suspended (GuardSuspended) until spec.suspend was true and is false again",
        default="Fail",
        example="Warn",
    )


class Guards(SpecModel):
    """What training must keep to."""

    non_finite: Literal["Fail"] | None = optional(
        "What a loss or a gradient that is NaN or infinite means: the job ends with NonFinite, on all ranks, before "
        "the step is applied",
        default="Fail",
        example="Fail",
    )
    rules: Annotated[tuple[GuardRule, ...], Field(min_length=1, max_length=MAX_RULES)] | None = optional(
        "Bounds of metrics. In stage RL there are two that warn where no rule is on the same metric: "
        "sampling/sampling_logp_difference/mean above 0.1 in 3 steps running, and of GRPO and RLOO "
        "frac_reward_zero_std above 0.99 in 10",
        default="none; RL: two that warn",
        example=[{"metric": "kl", "above": 0.5, "forSteps": 3}],
    )
