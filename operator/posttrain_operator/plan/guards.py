"""The guards' record: what the spec says, and in stage RL what nobody should miss. Names are held against what the job
measures."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain_api.guards import GuardRule, GuardsConfig
from posttrain_api.measured import EVALUATION, SAMPLING_DIFFERENCE, measured
from posttrain_api.problems import suggest
from posttrain_api.spec.guards import Guards
from posttrain_api.trainer import TrainerConfig
from posttrain_operator.plan.context import Context
from posttrain_operator.plan.errors import refuse

SAMPLER_RULE = GuardRule(metric=SAMPLING_DIFFERENCE, above=0.1, for_steps=3, action="Warn")
"""A sampler that rounds differently is off by some hundredths of a nat; at a tenth it samples from another policy."""
VARIANCE_RULE = GuardRule(metric="frac_reward_zero_std", above=0.99, for_steps=10, action="Warn")
"""Where all completions of every group get the same reward there is nothing to learn."""


def guarded(context: Context, config: TrainerConfig) -> TrainerConfig:
    """The job's configuration with its guards. PlanError where a rule names a metric that the job does not measure."""
    said = (context.spec.guards or Guards()).rules or ()
    rules = tuple(GuardRule(**rule.model_dump(exclude_none=True)) for rule in said)
    _check(config, rules)
    built_in = (rule for rule in _built_in(config) if rule.metric not in {each.metric for each in rules})
    return config.model_copy(update={"guards": GuardsConfig(rules=(*rules, *built_in))})


def _built_in(config: TrainerConfig) -> Iterator[GuardRule]:
    if config.stage == "RL":
        yield SAMPLER_RULE
    if config.stage == "RL" and config.algorithm != "PPO":
        yield VARIANCE_RULE


def _check(config: TrainerConfig, rules: tuple[GuardRule, ...]) -> None:
    known = measured(config)
    for number, rule in enumerate(rules):
        if rule.metric in known:
            continue
        path = f"spec.guards.rules[{number}].metric"
        if rule.metric.startswith(EVALUATION) and not config.data.eval:
            raise refuse(path, "needs data.eval", rule.metric, "add a held-out set, or guard a metric of the training")
        raise refuse(path, "must be measured by this job", rule.metric, suggest(rule.metric, known))
