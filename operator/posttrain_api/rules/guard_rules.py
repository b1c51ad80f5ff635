"""What a guard must be: one bound, of a metric that some job measures. Which ones this job measures, the plan knows."""

from __future__ import annotations

from posttrain_api.measured import NAME
from posttrain_api.rules.types import Rule, cel_matches, matches, one_of

GUARD_RULES: tuple[Rule, ...] = (
    one_of("spec.guards.rules[]", ("above", "below"), "keep one bound; another is another item of the list"),
    Rule(
        at=("spec.guards.rules[].metric",),
        cel=cel_matches("self", NAME),
        must="must be the name of a metric",
        instead="take one from metrics.jsonl, e.g. loss, grad_norm, kl, reward or eval_loss; docs/users/guards.md "
        "lists them by stage",
        holds=lambda metric: matches(metric, NAME),
    ),
)
