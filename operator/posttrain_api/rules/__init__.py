"""The cross-field rules of the API, each once: CEL for the API server, Python for operator and command line, one
message.

`posttrain_api.crd` writes them into the CRD, `posttrain_api.job` checks them when a job is read. A rule that both
cannot express
does not belong here.
"""

from __future__ import annotations

from posttrain_api.rules.spec_rules import SPEC_RULES
from posttrain_api.rules.transitions import STATUS_RULES, TRANSITION_RULES
from posttrain_api.rules.types import Rule
from posttrain_api.rules.uris import URI_RULES

__all__ = ["CHECKED_RULES", "RULES", "Rule"]

CHECKED_RULES: tuple[Rule, ...] = SPEC_RULES + URI_RULES
"""Rules that can be checked on one object alone."""
RULES: tuple[Rule, ...] = CHECKED_RULES + TRANSITION_RULES + STATUS_RULES
