"""Laws of every plan, over mixtures of accepted jobs."""

from __future__ import annotations

import json
import posixpath
from dataclasses import replace
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from posttrain_api.job import Job, check, parse_job
from posttrain_api.records import Best, Resolved
from posttrain_api.status.resolved import ResolvedSpec
from posttrain_api.trainer import TrainerConfig
from posttrain_operator.plan.build import build_plan
from posttrain_operator.plan.defaults import PROMPT_LENGTH, TABLE
from posttrain_operator.plan.parents import dependencies
from posttrain_operator.plan.resolved import settle
from posttrain_operator.plan.types import Parent, Plan
from tests.api.rule_cases import ACCEPTED, job
from tests.controller.plan_kit import SETTINGS, UID, parent, plan

PREPARED = Resolved(
    zero_stage=2,
    warmup_steps=3,
    total_steps=100,
    precision="FP32",
    attention="SDPA",
    revision="abc",
    parameters=7,
    trainable_parameters=5,
)


MIXED = sorted(set(ACCEPTED) - {"a guard", "guards of every kind"})
"""Whether a job measures what a guard names depends on all the rest: test_plan_guards has these."""


@st.composite
def manifests(draw: st.DrawFn) -> dict[str, Any]:
    """A valid job: up to four accepted changes together."""
    mixture: dict[str, Any] = {"metadata.uid": UID}
    for name in draw(st.lists(st.sampled_from(MIXED), min_size=1, max_size=4)):
        mixture |= ACCEPTED[name]
    try:
        manifest = job(mixture)
    except (AttributeError, TypeError):
        assume(False)  # one change goes into what another took away
        raise
    assume(not check(manifest))
    return manifest


def build(manifest: dict[str, Any]) -> Plan:
    subject = parse_job(manifest)
    return build_plan(subject, SETTINGS, {name: finished(name, subject) for name in dependencies(subject)})


def finished(name: str, child: Job) -> Parent:
    """A parent of the kind that the child asks for."""
    continues = child.spec.lora is not None and child.spec.lora.continue_adapter
    found = parent(name, "peft" if continues else "safetensors")
    best = Best(step=1, metric="eval_loss", value=0.5, uri="pvc://parent-claim/best")
    resolved = {"model": {"uri": "pvc://base-claim/x", "adapters": ["pvc://older-claim/y"]}}
    stage = "RewardModel" if name == "judge" else child.spec.stage
    return replace(found, stage=stage, best=best, resolved=resolved)


@given(manifests())
def test_every_valid_job_has_a_plan_and_always_the_same(manifest: dict[str, Any]) -> None:
    made = build(manifest)
    assert made == build(json.loads(json.dumps(manifest)))
    assert TrainerConfig.model_validate_json(made.config.to_json()) == made.config


@given(manifests())
def test_no_path_leaves_its_mount(manifest: dict[str, Any]) -> None:
    made = build(manifest)
    config = made.config
    models = [config.model.source, *config.model.adapters]
    if config.reference:
        models += [config.reference.source, *config.reference.adapters]
    for beside in (*(reward.model for reward in config.rewards), config.critic):
        models += [beside.source, *beside.adapters] if beside else []
    for script in (reward.python.path for reward in config.rewards if reward.python):
        assert posixpath.normpath(script) == script
        assert script.split("/")[4] in made.config_maps
    sources = [*config.data.train, *config.data.eval, *models, config.checkpoint.start_from]
    for source in sources:
        if source and source.path and source.uri.startswith("pvc://"):
            assert posixpath.normpath(source.path) == source.path
            assert source.path.split("/")[1] == "claims"
            assert source.path.split("/")[2] in made.claims
    assert posixpath.normpath(config.run_dir) == config.run_dir


@given(manifests())
def test_resolved_fits_the_status(manifest: dict[str, Any]) -> None:
    """An undeclared field in a server-side apply is an error of the API server's, so none may be there."""
    made = build(manifest)
    for resolved in (made.resolved, settle(made.resolved, PREPARED), settle(made.resolved, None)):
        assert ResolvedSpec.model_validate(resolved).to_wire() == json.loads(json.dumps(resolved))


@given(manifests())
def test_settled_means_no_auto_is_left_for_the_trainer(manifest: dict[str, Any]) -> None:
    settled = settle(build(manifest).resolved, PREPARED)
    assert settled["deepspeed"]["zeroStage"] == 2
    assert (settled["training"]["warmupSteps"], settled["training"]["totalSteps"]) == (3, 100)
    assert (settled["model"]["attention"], settled["model"]["revision"]) == ("SDPA", "abc")


def test_hash_follows_every_change() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"spec.lora.rank": 8},
        {"spec.image": "x"},
        {"spec.env": [{"name": "A", "value": "b"}]},
        {"spec.storage.claimName": "y"},
        {"spec.resources": {"nodes": 2}},
        {"spec.resources": {"nodeSelector": {"a": "b"}}},
        {"metadata.uid": "other"},
        {"spec.serviceAccountName": "x"},
        {"spec.runPolicy": {"terminationGracePeriodSeconds": 7}},
    ]
    assert len({plan(change).spec_hash for change in changes}) == len(changes)


def test_hash_ignores_what_changes_no_pod() -> None:
    same: list[dict[str, Any]] = [
        {},
        {"spec.suspend": True},
        {"spec.runPolicy": {"activeDeadlineSeconds": 5}},
        {"spec.tuning": "LoRA"},
    ]
    assert len({plan(change).spec_hash for change in same}) == 1


def _short(rate: float) -> str:
    """1e-05 as people write it."""
    return f"{rate:g}".replace("e-0", "e-") if rate < 1e-4 else f"{rate:.0e}".replace("e-0", "e-")


def test_defaults_are_described_as_they_are() -> None:
    """The words of kubectl explain, against the table."""
    from posttrain_api.spec.data import Data
    from posttrain_api.spec.training import CheckpointPolicy, Training

    def words(model: Any, field: str) -> str:
        return model.model_fields[field].description.partition("Default: ")[2].partition(". ")[0].rstrip(".")

    row = TABLE["SFT", "LoRA"]
    rates = words(Training, "learning_rate")
    for stage in ("SFT", "RewardModel", "Preference", "RL"):
        both = (
            f"{_short(TABLE[stage, 'LoRA'].learning_rate)} with LoRA, {_short(TABLE[stage, 'Full'].learning_rate)} full"
        )
        assert f"{stage} {both}" in rates
    assert f"Pretrain {_short(TABLE['Pretrain', 'Full'].learning_rate)}" in rates
    decay = words(Training, "weight_decay")
    assert decay.startswith("full: Pretrain 0")
    assert decay.endswith("otherwise 0")
    decays = {key: row.weight_decay for key, row in TABLE.items() if row.weight_decay}
    assert decays == {("Pretrain", "Full"): 0.1, ("SFT", "Full"): 0.01, ("RewardModel", "Full"): 0.01}
    for field in ("epochs", "batch_size", "epsilon", "seed", "min_learning_rate_ratio", "max_grad_norm"):
        assert float(words(Training, field).partition(";")[0]) == getattr(row, field), field
    online = TABLE["RL", "LoRA"]
    assert words(Training, "batch_size").endswith(f"; RL {online.batch_size}")
    assert words(Training, "schedule") == f"{row.schedule}; RL {online.schedule}"
    config = plan().config
    assert words(Training, "tokens_per_micro_batch") == str(config.training.tokens_per_micro_batch)
    said = f"; RL: maxPromptLength ({PROMPT_LENGTH} unless said) + rollout.maxNewTokens"
    assert words(Data, "max_length") == f"{config.data.max_length}{said}"
    assert float(words(Data, "too_long_max_fraction")) == row.too_long_max_fraction
    assert words(CheckpointPolicy, "every_seconds") == str(config.checkpoint.every_seconds)
    assert words(CheckpointPolicy, "keep_last") == str(config.checkpoint.keep_last)
