"""Models of earlier jobs: outputs, best models, chains of adapters, references; what is mounted and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from posttrain_api.reasons import Reason
from posttrain_api.records import Best
from posttrain_operator.plan.build import build_plan
from posttrain_operator.plan.errors import PlanError
from posttrain_operator.plan.types import Parent, Plan
from tests.api.rule_cases import CHAIN, COMMIT, PREFERENCE, REWARD
from tests.controller.plan_kit import SETTINGS, job, parent

FROM_JOB = {"spec.model": {"fromJob": {"name": "base"}}}
HUB = "hf://org/base"
OUTPUT = "pvc://parent-claim/base/u0/output"
SHAPE = {"rank": 4, "alpha": 9.0, "dropout": 0.5, "targetModules": ["q_proj"], "rslora": True, "dora": False}


def adapter(**model: Any) -> Parent:
    """A finished job whose output is an adapter on `uri`."""
    resolved = {"model": {"uri": HUB, **model}, "lora": {**SHAPE, "continueAdapter": False}}
    return replace(parent(kind="peft"), stage="SFT", resolved=resolved)


def made(changes: Mapping[str, Any], base: Parent) -> Plan:
    return build_plan(job(changes), SETTINGS, {"base": base})


def refused(changes: Mapping[str, Any], base: Parent) -> PlanError:
    with pytest.raises(PlanError) as caught:
        made(changes, base)
    return caught.value


def test_an_adapter_is_laid_on_its_base() -> None:
    plan = made(FROM_JOB, adapter(revision=COMMIT, secretRef={"name": "hf-token"}))
    model = plan.config.model
    assert model.source is not None
    assert (model.source.uri, model.source.revision) == (f"{HUB}@{COMMIT}", COMMIT), "at the commit it was trained on"
    assert model.source.secret_path == "/etc/posttrain/secrets/hf-token"
    assert [place.path for place in model.adapters] == ["/claims/parent-claim/base/u0/output"]
    assert (plan.claims, plan.secrets) == (("datasets", "parent-claim"), ("hf-token",))
    shown = plan.resolved["model"]
    assert (shown["uri"], shown["adapters"]) == (f"{HUB}@{COMMIT}", [OUTPUT])
    assert shown["secretRef"] == {"name": "hf-token"}


def test_a_longer_chain_is_oldest_first_and_mounted() -> None:
    earlier = "pvc://older/first/u/output"
    plan = made(FROM_JOB, adapter(adapters=[earlier]))
    assert [place.uri for place in plan.config.model.adapters] == [earlier, OUTPUT]
    assert plan.claims == ("datasets", "older", "parent-claim")


def test_a_continued_adapter_replaces_its_own_start() -> None:
    grown = adapter(adapters=["pvc://a/x", "pvc://b/y"])
    grown = replace(grown, resolved={**grown.resolved, "lora": {**SHAPE, "continueAdapter": True}})
    plan = made(FROM_JOB, grown)
    assert [place.uri for place in plan.config.model.adapters] == ["pvc://a/x", OUTPUT]
    assert plan.claims == ("a", "datasets", "parent-claim")


def test_the_childs_status_carries_the_chain_on() -> None:
    """What a child shows is all that its own child needs."""
    first = made(FROM_JOB, adapter(revision=COMMIT, secretRef={"name": "s"}))
    second = replace(adapter(), resolved=first.resolved)
    model = made(FROM_JOB, second).config.model
    assert model.source == first.config.model.source
    assert [place.uri for place in model.adapters] == [OUTPUT, OUTPUT]


def test_continue_adapter_keeps_its_shape() -> None:
    lora = made(CHAIN, adapter()).config.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.target_modules) == (4, 9.0, ("q_proj",))
    assert (lora.rslora, lora.dora, lora.continue_adapter) == (True, False, True)
    assert lora.dropout == 0.0, "dropout is of a training, not of an adapter"
    changes = {**CHAIN, "spec.lora": {"continueAdapter": True, "dropout": 0.25}}
    assert made(changes, adapter()).config.lora.dropout == 0.25


def test_quantization_is_of_a_training_not_of_an_adapter() -> None:
    rounded = adapter()
    rounded = replace(rounded, resolved={**rounded.resolved, "lora": {**SHAPE, "quantization": "NF4"}})
    assert made(CHAIN, rounded).config.lora.quantization is None
    plan = made({**CHAIN, "spec.lora": {"continueAdapter": True, "quantization": "NF4"}}, adapter())
    assert plan.config.lora.quantization == "NF4"
    assert plan.resolved["lora"]["quantization"] == "NF4"
    assert made({**FROM_JOB, "spec.lora": {"quantization": "NF4"}}, adapter()).config.lora.quantization == "NF4"


def test_continue_adapter_of_a_whole_model() -> None:
    error = refused(CHAIN, parent())
    assert error.reason == Reason.UNSUPPORTED
    assert "spec.lora.continueAdapter: needs a job whose output is an adapter; that of base is a whole model" in str(
        error
    )


def test_continue_adapter_with_another_head() -> None:
    error = refused({**CHAIN, **REWARD}, adapter())
    assert error.reason == Reason.UNSUPPORTED
    assert "that of base has another head" in str(error)
    scorer = replace(adapter(), stage="RewardModel")
    assert made({**CHAIN, **REWARD}, scorer).config.lora.continue_adapter


def test_an_adapter_of_unknown_base() -> None:
    error = refused(FROM_JOB, parent(kind="peft"))
    assert error.reason == Reason.DEPENDENCY_FAILED
    assert "mergeAdapter: true" in str(error)


@pytest.mark.parametrize("changes", [{}, PREFERENCE, {"spec.stage": "Pretrain"}])
def test_a_reward_model_answers_nothing(changes: Mapping[str, Any]) -> None:
    scorer = replace(parent(), stage="RewardModel")
    error = refused({**FROM_JOB, **changes}, scorer)
    assert error.reason == Reason.UNSUPPORTED
    assert "names a reward model" in str(error)
    assert made({**FROM_JOB, **REWARD}, scorer).config.model.source is not None, "it may be trained further"


def test_code_of_a_chains_base_is_pinned() -> None:
    changes = {"spec.model": {"fromJob": {"name": "base"}, "trustRemoteCode": True}}
    error = refused(changes, adapter())
    assert error.reason == Reason.INVALID_SPEC
    assert "spec.model.trustRemoteCode: needs a model whose code is pinned" in str(error)
    assert made(changes, adapter(revision=COMMIT)).config.model.trust_remote_code
    assert made(changes, adapter(uri="pvc://models/x")).config.model.trust_remote_code


BEST = {"spec.model": {"fromJob": {"name": "base", "checkpoint": "Best"}}}
KEPT = Best(step=3, metric="eval_loss", value=0.5, uri="pvc://parent-claim/base/u0/best")


def test_the_best_model() -> None:
    plan = made(BEST, replace(parent(), best=KEPT))
    assert plan.config.model.source is not None
    assert plan.config.model.source.path == "/claims/parent-claim/base/u0/best"
    kept = replace(adapter(), best=KEPT)
    assert [place.uri for place in made(BEST, kept).config.model.adapters] == [KEPT.uri], "in the output's format"


def test_no_best_model() -> None:
    error = refused(BEST, parent())
    assert error.reason == Reason.DEPENDENCY_FAILED
    assert "spec.model.fromJob.checkpoint: asks for the best model of base, which kept none" in str(error)
    assert "keepBest: true" in str(error)


def test_a_reference_by_uri() -> None:
    said = {"uri": "hf://a/b@main", "secretRef": {"name": "hf-token"}}
    plan = made({**PREFERENCE, "spec.reference": said}, parent())
    reference = plan.config.reference
    assert reference is not None
    assert (reference.source.uri, reference.source.revision, reference.adapters) == ("hf://a/b@main", "main", ())
    assert reference.source.secret_path == "/etc/posttrain/secrets/hf-token"
    assert plan.secrets == ("hf-token",)
    assert plan.resolved["reference"] == {"uri": "hf://a/b@main"}


def test_a_reference_by_job() -> None:
    changes = {**PREFERENCE, "spec.reference": {"fromJob": {"name": "base"}}}
    plan = made(changes, adapter())
    reference = plan.config.reference
    assert reference is not None
    assert (reference.source.uri, [place.uri for place in reference.adapters]) == (HUB, [OUTPUT])
    assert plan.claims == ("datasets", "parent-claim")
    assert plan.resolved["reference"] == {"uri": HUB, "adapters": [OUTPUT]}
    assert "names a reward model" in str(refused(changes, replace(parent(), stage="RewardModel")))


def test_no_reference_is_the_starting_model() -> None:
    plan = made(PREFERENCE, parent())
    assert plan.config.reference is None
    assert "reference" not in plan.resolved
