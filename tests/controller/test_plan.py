"""What the plan makes of a job: resolution order, sources, parents, and what it refuses."""

from __future__ import annotations

import pytest

from posttrain_api.reasons import Reason
from posttrain_operator.plan.build import build_plan
from posttrain_operator.plan.errors import PlanError
from posttrain_operator.plan.parents import dependencies
from posttrain_operator.plan.sources import locate, split_claim
from tests.api.rule_cases import EVAL, PREFERENCE, PRETRAIN, REMOVE, REWARD
from tests.controller.plan_kit import SETTINGS, UID, job, parent, plan

FROM_JOB = {"spec.model": {"fromJob": {"name": "base"}}}
FROM_CHECKPOINT = {"spec.checkpoint": {"from": {"fromJob": {"name": "base"}}}}


def test_smallest_job() -> None:
    made = plan()
    config = made.config
    assert (config.stage, config.tuning) == ("SFT", "LoRA")
    assert config.model.source is not None
    assert config.model.source.uri == "hf://Qwen/Qwen2.5-1.5B-Instruct"
    assert config.model.source.path is None, "fetched by prepare"
    assert config.data.train[0].path == "/claims/datasets/gsm8k/train.jsonl"
    assert config.run_dir == f"/storage/my-job/{UID}"
    assert config.run_uri == f"pvc://runs/my-job/{UID}"
    assert (made.storage_claim, made.claims, made.config_maps, made.secrets) == ("runs", ("datasets",), (), ())
    assert (made.image, made.image_pull_policy) == ("trainer:1", "IfNotPresent")


@pytest.mark.parametrize(
    ("changes", "rate", "decay", "betas", "too_long", "loss_on"),
    [
        ({}, 2e-4, 0.0, (0.9, 0.999), "Skip", "Auto"),
        ({"spec.lora": REMOVE, "spec.tuning": "LoRA"}, 2e-4, 0.0, (0.9, 0.999), "Skip", "Auto"),
        ({"spec.lora": REMOVE, "spec.tuning": "Full"}, 1e-5, 0.01, (0.9, 0.999), "Skip", "Auto"),
        (PRETRAIN, 3e-4, 0.1, (0.9, 0.95), "Split", "All"),
        ({"spec.stage": "Pretrain"}, 3e-4, 0.0, (0.9, 0.95), "Split", "All"),
        (REWARD, 1e-4, 0.0, (0.9, 0.999), "Skip", "Auto"),
        ({**REWARD, "spec.lora": REMOVE, "spec.tuning": "Full"}, 1e-5, 0.01, (0.9, 0.999), "Skip", "Auto"),
        (PREFERENCE, 5e-6, 0.0, (0.9, 0.999), "Skip", "Auto"),
        ({**PREFERENCE, "spec.lora": REMOVE, "spec.tuning": "Full"}, 5e-7, 0.0, (0.9, 0.999), "Skip", "Auto"),
    ],
)
def test_built_in_table(changes, rate, decay, betas, too_long, loss_on) -> None:
    config = plan(changes).config
    training = config.training
    assert (training.learning_rate, training.weight_decay) == (rate, decay)
    assert (training.beta1, training.beta2) == betas
    assert (config.data.too_long, config.data.loss_on) == (too_long, loss_on)
    assert (training.batch_size, training.epochs, training.max_steps, training.warmup_steps) == (64, 1.0, None, "Auto")
    assert (training.schedule, training.min_learning_rate_ratio, training.epsilon) == ("Cosine", 0.0, 1e-8)
    assert (training.max_grad_norm, training.seed, training.precision) == (1.0, 0, "BF16")
    assert training.gradient_checkpointing == "Auto"
    assert (config.data.max_length, training.tokens_per_micro_batch) == (2048, 8192)
    assert (config.checkpoint.every_seconds, config.checkpoint.keep_last, config.checkpoint.resume) == (1800, 2, "Auto")
    assert config.zero_stage == "Auto"


def test_the_spec_wins_over_the_table() -> None:
    said = {
        "maxSteps": 7,
        "batchSize": 3,
        "tokensPerMicroBatch": 99,
        "learningRate": 0.5,
        "schedule": "Linear",
        "warmupSteps": 0,
        "minLearningRateRatio": 0.25,
        "weightDecay": 0,
        "betas": [0.1, 0.2],
        "epsilon": 0.125,
        "maxGradNorm": 0,
        "seed": 5,
        "precision": "FP32",
        "gradientCheckpointing": False,
    }
    config = plan({"spec.training": said, "spec.deepspeed": {"zeroStage": 0}}).config
    wire = config.training.to_wire()
    betas = said.pop("betas")
    assert {**wire, **said} == wire, "a zero is a word too"
    assert [config.training.beta1, config.training.beta2] == betas
    assert config.training.epochs is None
    assert config.zero_stage == 0


def test_data_words() -> None:
    data = {
        "train": [
            {
                "uri": "hf://openai/gsm8k@main",
                "subset": "main",
                "split": "train",
                "columns": {"prompt": "question"},
                "maxRows": 5,
            }
        ],
        "maxLength": 16384,
        "lossOn": "All",
        "tooLong": "Fail",
        "tooLongMaxFraction": 0,
        "badRows": {"policy": "Skip", "maxFraction": 0.5},
    }
    config = plan({"spec.data": data}).config
    (source,) = config.data.train
    assert (source.revision, source.subset, source.split, source.max_rows) == ("main", "main", "train", 5)
    assert source.columns == {"prompt": "question"}
    assert (config.data.loss_on, config.data.too_long, config.data.too_long_max_fraction) == ("All", "Fail", 0.0)
    assert (config.data.bad_rows_policy, config.data.bad_rows_max_fraction) == ("Skip", 0.5)
    assert config.training.tokens_per_micro_batch == 16384, "a micro-batch holds the longest sequence"


def test_lora_words() -> None:
    lora = plan({"spec.lora": {"rank": 4, "dropout": 0.5, "targetModules": ["q_proj"]}}).config.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (4, 8.0, 0.5, ("q_proj",))
    bare = plan({"spec.lora": {}}).config.lora
    assert bare is not None
    assert (bare.rank, bare.alpha) == (16, 32.0)
    assert plan({"spec.lora": REMOVE, "spec.tuning": "Full"}).config.lora is None


def test_scratch_shape() -> None:
    scratch = plan(PRETRAIN).config.model.scratch
    assert scratch is not None
    assert (scratch.intermediate_size, scratch.kv_heads, scratch.head_dim, scratch.max_length) == (1024, 8, 32, 2048)
    short = plan({**PRETRAIN, "spec.model.scratch.maxLength": 64}).config
    assert short.data.max_length == 64


def test_scratch_tokenizer() -> None:
    tokenizer = {"uri": "hf://a/b", "secretRef": {"name": "hf-token"}}
    made = plan({**PRETRAIN, "spec.model.scratch.tokenizer": tokenizer})
    scratch = made.config.model.scratch
    assert scratch is not None
    assert scratch.tokenizer is not None
    assert scratch.tokenizer.secret_path == "/etc/posttrain/secrets/hf-token"
    assert made.config.model.source is None
    assert made.secrets == ("hf-token",)


def test_mounts_are_collected_once() -> None:
    train = [{"uri": "pvc://b/x"}, {"uri": "pvc://a/y"}, {"uri": "pvc://b/z"}, {"uri": "configmap://toy/k"}]
    made = plan({"spec.data.train": train, "spec.model.uri": "pvc://runs/m", **EVAL})
    assert made.claims == ("a", "b", "datasets", "runs"), "the storage claim too, read-only, where it is read from"
    assert made.config_maps == ("toy",)
    assert made.config.data.train[3].path == "/etc/posttrain/configmaps/toy/k"


@pytest.mark.parametrize(
    ("uri", "path", "revision"),
    [
        ("hf://a/b", None, None),
        ("hf://a/b@main", None, "main"),
        ("s3://bucket/a/b.jsonl", None, None),
        ("gs://bucket/a@b/", None, None),
        ("pvc://c", "/claims/c", None),
        ("pvc://c/", "/claims/c", None),
        ("pvc://c/a/b/", "/claims/c/a/b", None),
        ("pvc://c/a..b", "/claims/c/a..b", None),
        ("image:///m/x/", "/m/x", None),
        ("configmap://n/k.jsonl", "/etc/posttrain/configmaps/n/k.jsonl", None),
    ],
)
def test_sources(uri: str, path: str | None, revision: str | None) -> None:
    source = locate(uri, None, SETTINGS, "spec.x").source
    assert (source.uri, source.path, source.revision) == (uri, path, revision)


@pytest.mark.parametrize(
    "uri",
    ["pvc://c/../x", "image:///..", "configmap://a/..", "pvc://..", "s3://a/../b", "ftp://a/b", "plain", "", "pvc://"],
)
def test_sources_refused(uri: str) -> None:
    """Older objects may hold what today's rules refuse."""
    with pytest.raises(PlanError) as caught:
        locate(uri, None, SETTINGS, "spec.x")
    assert caught.value.reason == Reason.INVALID_SPEC
    assert caught.value.problems[0].path == "spec.x"


def test_split_claim() -> None:
    assert split_claim("pvc://a/b/c/") == ("a", "b/c")
    assert split_claim("pvc://a") == ("a", "")
    with pytest.raises(ValueError, match="not a pvc:// URI"):
        split_claim("hf://a")


def test_dependencies() -> None:
    assert dependencies(job()) == ()
    assert dependencies(job(FROM_JOB)) == ("base",)
    assert dependencies(job({**FROM_JOB, **FROM_CHECKPOINT})) == ("base",)
    other = {"spec.checkpoint": {"from": {"fromJob": {"name": "other"}}}}
    assert dependencies(job({**FROM_JOB, **other})) == ("base", "other")


def test_parent_output_is_the_source() -> None:
    made = plan(FROM_JOB)
    assert made.config.model.source is not None
    assert made.config.model.source.path == "/claims/parent-claim/base/u0/output"
    assert made.config.model.source.uri == "pvc://parent-claim/base/u0/output"
    assert made.claims == ("datasets", "parent-claim")


def test_parent_checkpoint_is_the_start() -> None:
    made = plan(FROM_CHECKPOINT)
    start = made.config.checkpoint.start_from
    assert start is not None
    assert start.path == "/claims/parent-claim/base/u0/checkpoints"
    assert "parent-claim" in made.claims
    by_path = plan({"spec.checkpoint": {"from": {"uri": "pvc://runs/x/checkpoints/step-1"}}})
    assert by_path.config.checkpoint.start_from is not None
    assert by_path.config.checkpoint.start_from.path == "/claims/runs/x/checkpoints/step-1"


def test_missing_parent() -> None:
    with pytest.raises(PlanError) as caught:
        build_plan(job(FROM_JOB), SETTINGS, {})
    assert caught.value.reason == Reason.WAITING_FOR_DEPENDENCY
    assert "spec.model.fromJob.name: names a job that has not succeeded yet" in str(caught.value)


def test_parent_without_a_checkpoint() -> None:
    with pytest.raises(PlanError) as caught:
        build_plan(job(FROM_CHECKPOINT), SETTINGS, {"base": parent(saved=False)})
    assert caught.value.reason == Reason.UNSUPPORTED


def test_job_without_a_uid() -> None:
    with pytest.raises(ValueError, match="no uid"):
        build_plan(job({"metadata.uid": ""}), SETTINGS, {})


def test_small_words_reach_the_trainer() -> None:
    made = plan(
        {"spec.output": {"mergeAdapter": True}, **EVAL, "spec.evaluation": {"everySteps": 5}, "spec.image": "mine:2"}
    )
    assert made.config.merge_adapter
    assert made.config.evaluation.every_steps == 5
    assert made.config.data.eval[0].path == "/claims/datasets/test.jsonl"
    assert made.image == "mine:2"
    model = {
        "uri": "pvc://a",
        "attention": "Eager",
        "trustRemoteCode": True,
        "chatTemplate": "{{ x }}",
    }
    config = plan({"spec.model": model}).config.model
    assert (config.attention, config.trust_remote_code, config.chat_template) == ("Eager", True, "{{ x }}")
