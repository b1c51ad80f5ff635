"""Accepted and refused guards, for the tables of rule_cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.api.case_kit import Refused

KL = {"metric": "kl", "above": 0.5}


def _rules(*rules: Mapping[str, Any]) -> dict[str, Any]:
    return {"spec.guards": {"rules": list(rules)}}


ACCEPTED_GUARDS: dict[str, Mapping[str, Any]] = {
    "not finite": {"spec.guards": {"nonFinite": "Fail"}},
    "no guards": {"spec.guards": {}},
    "a guard": _rules({**KL, "forSteps": 3, "action": "Suspend"}),
    "guards of every kind": _rules(
        {"metric": "loss", "above": 20},
        {"metric": "eval_loss", "above": 4.5, "action": "Warn"},
        {"metric": "entropy", "below": 0.01, "forSteps": 10, "action": "Warn"},
        {"metric": "rewards/my-reward_2/mean", "below": -1},
        {"metric": "eval_rewards/math/mean", "below": 0},
        {"metric": "sampling/sampling_logp_difference/mean", "above": 0.3, "action": "Fail"},
        {"metric": "objective/kl", "above": 1e3},
        {"metric": "objective/kl", "below": -50},
    ),
}

_FIRST, _METRIC = "spec.guards.rules[0]", "the name of a metric"

REFUSED_GUARDS: tuple[Refused, ...] = (
    Refused("no bound", _rules({"metric": "kl"}), _FIRST, "needs exactly one of above, below"),
    Refused("two bounds", _rules({**KL, "below": 0}), _FIRST, "needs exactly one of above, below"),
    Refused("no metric of ours", _rules({"metric": "lost", "above": 1}), f"{_FIRST}.metric", _METRIC),
    Refused("a metric and more", _rules({"metric": "kl2", "above": 1}), f"{_FIRST}.metric", _METRIC),
    Refused("a phase's time", _rules({"metric": "time/data", "above": 1}), f"{_FIRST}.metric", _METRIC),
    Refused("a reward of nobody", _rules({"metric": "rewards//mean", "above": 1}), f"{_FIRST}.metric", _METRIC),
)

REFUSED_GUARDS_BY_SCHEMA: tuple[Refused, ...] = (
    Refused("steps that are skipped", {"spec.guards": {"nonFinite": "Skip"}}, "spec.guards.nonFinite", "Fail"),
    Refused("no rules", {"spec.guards": {"rules": []}}, "spec.guards.rules", "at least 1"),
    Refused("too many rules", _rules(*[KL] * 17), "spec.guards.rules", "at most 16"),
    Refused("a rule without a metric", _rules({"above": 1}), f"{_FIRST}.metric", "equired"),
    Refused("for no steps", _rules({**KL, "forSteps": 0}), f"{_FIRST}.forSteps", "1"),
    Refused("another action", _rules({**KL, "action": "Stop"}), f"{_FIRST}.action", "Suspend"),
    Refused("a bound in words", _rules({"metric": "kl", "above": "much"}), f"{_FIRST}.above", "number"),
)
