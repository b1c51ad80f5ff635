"""parse_job against the table of accepted and refused jobs, and the rules against themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_api.job import InvalidJob, check, parse_job
from posttrain_api.rules import CHECKED_RULES, RULES
from posttrain_api.rules.types import has, nodes
from tests.api.rule_cases import ACCEPTED, BASE, REFUSED_BY_RULE, REFUSED_BY_SCHEMA, UNKNOWN, Refused, job

REFUSED = REFUSED_BY_RULE + REFUSED_BY_SCHEMA + UNKNOWN


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    assert check(job(ACCEPTED[name])) == ()


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused(case: Refused) -> None:
    with pytest.raises(InvalidJob) as caught:
        parse_job(job(case.changes))
    found = {problem.path: str(problem) for problem in caught.value.problems}
    assert case.path in found
    assert case.text in found[case.path]
    assert "; " in found[case.path], "a next step"


def test_every_rule_is_refused_somewhere() -> None:
    broken = set()
    for case in REFUSED_BY_RULE:
        manifest = job(case.changes)
        for number, rule in enumerate(CHECKED_RULES):
            for at in rule.at:
                broken |= {(number, at) for _, node in nodes(manifest, at) if rule.holds and not rule.holds(node)}
    wanted = {(number, at) for number, rule in enumerate(CHECKED_RULES) for at in rule.at}
    assert {(RULES[number].must, at) for number, at in wanted - broken} == set()


def test_every_rule_is_met_where_it_has_something_to_judge() -> None:
    """An accepted job has the field that the rule is about, or, where the field is never allowed, what is around it."""
    met = set()
    for changes in ACCEPTED.values():
        manifest = job(changes)
        for number, rule in enumerate(CHECKED_RULES):
            never = rule.cel == f"!(has(self{rule.field}))"
            field = "" if never else rule.field.lstrip(".")
            for at in rule.at:
                met |= {(number, at) for _, node in nodes(manifest, at) if not field or has(node, field)}
    wanted = {(number, at) for number, rule in enumerate(CHECKED_RULES) for at in rule.at}
    assert {(RULES[number].must, at, RULES[number].field) for number, at in wanted - met} == set()


def test_all_problems_at_once() -> None:
    manifest = job(
        {"spec.lora.rank": 0, "spec.stage": "KTO", "spec.model.uri": "s3://x", "spec.foo": 1, "metadata.name": "A"}
    )
    paths = {problem.path for problem in check(manifest)}
    assert paths == {"spec.lora.rank", "spec.stage", "spec.model.uri", "spec.foo", "metadata.name"}


def test_message_has_path_rule_value_and_next_step() -> None:
    (problem,) = check(job({"spec.lora.rank": 0}))
    assert str(problem) == "spec.lora.rank: must be between 1 and 512 (found 0); choose e.g. 16"


@pytest.mark.parametrize(
    ("typo", "meant"), [("spec.lora.rnk", "rank"), ("spec.Stage", "stage"), ("spec.data.maxlength", "maxLength")]
)
def test_did_you_mean(typo: str, meant: str) -> None:
    problems = {problem.path: problem.next_step for problem in check(job({typo: 1}))}
    assert problems[typo] == f"did you mean {meant}?"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PATHS = sorted(
    {path for changes in ACCEPTED.values() for path in changes}
    | {f"spec.{name}" for name in BASE["spec"]}
    | {"metadata", "spec"}
)


@given(
    path=st.sampled_from([path for path in PATHS if path.count(".") < 2 or path.startswith("spec.data")]),
    value=json_values,
)
def test_nothing_crashes_it(path: str, value: object) -> None:
    """Whatever stands anywhere, the answer is a list of problems."""
    for problem in check(job({path: value})):
        assert str(problem)


@given(json_values)
def test_rules_are_total(value: object) -> None:
    for rule in CHECKED_RULES:
        assert rule.holds is not None
        assert rule.holds(value) in (True, False)


def test_messages_are_one_line() -> None:
    for rule in RULES:
        assert "\n" not in rule.message
        assert len(rule.message) < 300
