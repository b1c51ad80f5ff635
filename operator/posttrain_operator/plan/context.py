"""What every part of the plan looks at: the job, the platform's settings, finished parents, and the row of the
built-in table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from posttrain_api.job import Job
from posttrain_api.spec import JobSpec
from posttrain_operator.plan.defaults import Defaults, Tuning, defaults_for
from posttrain_operator.plan.types import Parent, PlanSettings


@dataclass(frozen=True)
class Context:
    """Inputs of one plan."""

    job: Job
    settings: PlanSettings
    parents: Mapping[str, Parent]
    tuning: Tuning
    defaults: Defaults

    @property
    def spec(self) -> JobSpec:
        """The job's spec."""
        return self.job.spec


def context_of(job: Job, settings: PlanSettings, parents: Mapping[str, Parent]) -> Context:
    """Settles the tuning (a lora block means LoRA; Pretrain means Full) and takes the table's row."""
    spec = job.spec
    tuning: Tuning = "LoRA" if spec.lora is not None else spec.tuning or "Full"
    return Context(job, settings, parents, tuning, defaults_for(spec.stage, tuning))
