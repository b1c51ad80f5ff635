"""The CRD's rules on a real API server, and that parse_job agrees with it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain_api.crd.document import schema
from posttrain_api.job import check
from posttrain_api.rules import CHECKED_RULES
from posttrain_api.spec.rewards import KINDS
from tests.api.online_cases import EVERY_REWARD, MATH, PPO, RL, RLOO
from tests.api.rule_cases import ACCEPTED, PRETRAIN, REFUSED_BY_RULE, REFUSED_BY_SCHEMA, UNKNOWN, Refused, job
from tests.cluster.crd_rig import Rig

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("crd")]


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(crd_server: Rig, name: str) -> None:
    answer = crd_server.try_create(job(ACCEPTED[name]))
    assert answer.ok, answer.text


@pytest.mark.parametrize("case", REFUSED_BY_RULE, ids=lambda case: case.name)
def test_refused_by_a_rule(crd_server: Rig, case: Refused) -> None:
    answer = crd_server.try_create(job(case.changes))
    assert answer.code == 422, answer.text
    messages = [cause["message"] for cause in answer.body["details"]["causes"]]
    assert any(case.text in message for message in messages), messages
    if not case.path.startswith("metadata."):  # the API server has no field path into metadata
        assert case.path in {cause["field"] for cause in answer.body["details"]["causes"]}


@pytest.mark.parametrize("case", REFUSED_BY_SCHEMA, ids=lambda case: case.name)
def test_refused_by_the_schema(crd_server: Rig, case: Refused) -> None:
    answer = crd_server.try_create(job(case.changes))
    assert answer.code == 422, answer.text
    fields = {cause["field"] for cause in answer.body["details"]["causes"]}
    assert any(field.startswith(case.path.partition("[")[0]) for field in fields), fields


@pytest.mark.parametrize("case", UNKNOWN, ids=lambda case: case.name)
def test_unknown_fields(crd_server: Rig, case: Refused) -> None:
    answer = crd_server.try_create(job(case.changes))
    assert answer.code == 400
    assert f'unknown field "{case.path}"' in answer.body["message"]


def test_both_say_every_message_alike(crd_server: Rig) -> None:
    """The words that the two print for one fault are the same words."""
    said = {rule.message for rule in CHECKED_RULES}
    for case in REFUSED_BY_RULE:
        answer = crd_server.try_create(job(case.changes))
        ours = {f"{problem.rule}; {problem.next_step}" for problem in check(job(case.changes))} & said
        assert ours
        assert all(message in answer.body["message"] for message in ours), case.name


CHANGES = [dict(changes) for changes in ACCEPTED.values()]
CHANGES += [dict(case.changes) for case in REFUSED_BY_RULE + REFUSED_BY_SCHEMA]


def test_both_decide_alike_on_mixtures(crd_server: Rig) -> None:
    """Two to four changes of the table together: both accept or both refuse."""
    dice = random.Random(7)
    for _ in range(400):
        mixture: dict[str, Any] = {}
        for changes in dice.sample(CHANGES, dice.randint(2, 4)):
            mixture |= changes
        try:
            manifest = job(mixture)
        except (AttributeError, TypeError, ValueError):
            continue  # one change goes into what another took away
        answer, problems = crd_server.try_create(manifest), check(manifest)
        assert answer.ok == (not problems), (mixture, answer.text, list(map(str, problems)))


def leaves(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field of the spec that holds a value, with its schema; list items as item 0."""
    if "items" in node:
        yield path, node
        yield from leaves(node["items"], f"{path}.0")
    elif "properties" in node:
        yield path, node
        for name, child in node["properties"].items():
            yield from leaves(child, f"{path}.{name}")
    else:
        yield path, node


def edges(node: dict[str, Any]) -> list[Any]:
    """Values at the bounds, just beyond them, and of every wrong type."""
    values: list[Any] = ["", "x", True, 0, 1, -1, 1.5, [], {}, ["x"], {"x": "y"}, None, *node.get("enum", ())]
    for bound in (node.get("minimum"), node.get("maximum")):
        if bound is not None:
            values += [bound, bound - 1, bound + 1]
    if "maxLength" in node:
        values += ["a" * node["maxLength"], "a" * (node["maxLength"] + 1)]
    return values


LEAVES = list(leaves(schema()["properties"]["spec"], "spec"))


@pytest.mark.parametrize(("path", "node"), LEAVES, ids=[path for path, _ in LEAVES])
def test_both_decide_alike_at_every_bound(crd_server: Rig, path: str, node: dict[str, Any]) -> None:
    for value in edges(node):
        manifest = job({**base_of(path), path: value})
        answer, problems = crd_server.try_create(manifest), check(manifest)
        assert answer.ok == (not problems), (path, value, answer.text, list(map(str, problems)))


def base_of(path: str) -> dict[str, Any]:
    """A job in which the path may be said."""
    if "scratch" in path:
        return PRETRAIN
    block = path.partition("spec.")[2].partition(".")[0]
    if block in ("rollout", "rewards", "grpo"):
        return {**RL, "spec.rewards": [_reward(path)]}
    if block in ("ppo", "critic", "rloo"):
        return RLOO if block == "rloo" else PPO
    return with_lists(path)


def _reward(path: str) -> dict[str, Any]:
    """What the path does not say itself: a kind, and the rest of that kind."""
    kind = path.removeprefix("spec.rewards.0.").partition(".")[0]
    whole = next((reward[kind] for reward in EVERY_REWARD if kind in KINDS and kind in reward), None)
    inside = path.startswith(f"spec.rewards.0.{kind}.")
    return {kind: whole} if whole and inside else {} if whole else MATH


def with_lists(path: str) -> dict[str, Any]:
    """A list of one empty item where the path goes into one that the base lacks."""
    before = path.partition(".0")[0]
    return {before: [{}]} if before != path and before != "spec.data.train" else {}


any_text = st.text(min_size=1, max_size=20).filter(lambda text: "\x00" not in text)
uri = st.builds(
    "{}{}".format, st.sampled_from(["hf://", "pvc://", "image://", "configmap://", "s3://", "gs://b", ""]), any_text
)
path_like = st.from_regex(r"(hf|pvc|image|configmap)://[a-zA-Z0-9@/._ -]{1,24}", fullmatch=True)

URL = "spec.rewards.0.http.url"
address = st.builds("{}://{}".format, st.sampled_from(["http", "https", "HTTP"]), any_text)


@settings(max_examples=250, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(["spec.model.uri", "spec.data.train.0.uri", "spec.storage.claimName", "metadata.name", URL]),
    value=uri | address | path_like | st.from_regex(r"[-a-z0-9.A-Z]{1,60}", fullmatch=True),
)
def test_both_read_texts_alike(crd_server: Rig, field: str, value: str) -> None:
    """RE2 there and re here, on any text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return
    base = {**RL, "spec.rewards": [{"http": {}}]} if field == URL else {}
    manifest = job({**base, field: value})
    answer, problems = crd_server.try_create(manifest), check(manifest)
    assert answer.ok == (not problems), (field, value, answer.text, list(map(str, problems)))
