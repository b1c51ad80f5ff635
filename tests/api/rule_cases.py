"""One table of accepted and refused jobs, run through parse_job and through a real API server.

A case is a change to the smallest useful job. Both readers must say the same; for refused ones the message is compared
too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REMOVE = object()
LONGEST = "a" + "b" * 49
COMMIT = "0123456789abcdef0123456789abcdef01234567"

BASE: dict[str, Any] = {
    "apiVersion": "posttrain.dev/v1alpha1",
    "kind": "PostTrainingJob",
    "metadata": {"name": "my-job", "namespace": "default"},
    "spec": {
        "stage": "SFT",
        "model": {"uri": "hf://Qwen/Qwen2.5-1.5B-Instruct"},
        "data": {"train": [{"uri": "pvc://datasets/gsm8k/train.jsonl"}]},
        "lora": {"rank": 16},
        "storage": {"claimName": "runs"},
    },
}
SHAPE = {"family": "Llama", "vocabSize": 4096, "hiddenSize": 256, "layers": 4, "heads": 8}
PRETRAIN = {"spec.stage": "Pretrain", "spec.lora": REMOVE, "spec.model": {"scratch": SHAPE}}
CONTINUED = {"spec.stage": "Pretrain", "spec.lora": REMOVE}
EVAL = {"spec.data.eval": [{"uri": "pvc://datasets/test.jsonl"}]}


def job(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The smallest job with values set, or removed, at dotted paths."""
    manifest = copy.deepcopy(BASE)
    for path, value in changes.items():
        node: Any = manifest
        *parents, last = path.split(".")
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if isinstance(node, list):
            node[int(last)] = value
        elif value is REMOVE:
            node.pop(last, None)
        else:
            node[last] = copy.deepcopy(value)
    return manifest


@dataclass(frozen=True)
class Refused:
    """A change that both must refuse: `path` as parse_job says it, `text` in both messages."""

    name: str
    changes: Mapping[str, Any]
    path: str
    text: str


ACCEPTED: dict[str, Mapping[str, Any]] = {
    "smallest": {},
    "longest name": {"metadata.name": LONGEST},
    "full tuning": {"spec.lora": REMOVE, "spec.tuning": "Full"},
    "lora by word": {"spec.lora": REMOVE, "spec.tuning": "LoRA"},
    "lora by both": {"spec.tuning": "LoRA"},
    "pretrain from scratch": PRETRAIN,
    "pretrain from scratch, said": {**PRETRAIN, "spec.tuning": "Full"},
    "pretrain on": CONTINUED,
    "pretrain on with an adapter": {**CONTINUED, "spec.lora": {"rank": 8}},
    "pretrain splits": {**CONTINUED, "spec.data.tooLong": "Split"},
    "pretrain counts all": {**CONTINUED, "spec.data.lossOn": "All"},
    "sft on completions": {"spec.data.lossOn": "Completion"},
    "sft truncates": {"spec.data.tooLong": "Truncate"},
    "chat template": {"spec.model.chatTemplate": "{{ messages }}"},
    "from another job": {"spec.model": {"fromJob": {"name": "base"}}},
    "checkpoint of another job": {"spec.checkpoint": {"from": {"fromJob": {"name": "base"}}}},
    "checkpoint by path": {"spec.checkpoint": {"from": {"uri": "pvc://runs/base/3f/checkpoints/step-1"}}},
    "hub data": {"spec.data.train": [{"uri": "hf://openai/gsm8k", "subset": "main", "split": "train"}]},
    "secret of a hub model": {"spec.model.secretRef": {"name": "hf-token"}},
    "secret of hub data": {"spec.data.train": [{"uri": "hf://openai/gsm8k", "secretRef": {"name": "hf-token"}}]},
    "secret of a hub tokenizer": {
        **PRETRAIN,
        "spec.model.scratch.tokenizer": {"uri": "hf://a/b", "secretRef": {"name": "hf-token"}},
    },
    "baked-in model": {"spec.model.uri": "image:///models/qwen"},
    "model on a claim": {"spec.model.uri": "pvc://models/qwen 3/a..b/"},
    "whole claim": {"spec.model.uri": "pvc://models"},
    "branch of a hub model": {"spec.model.uri": "hf://gpt2@refs/pr/1"},
    "data in a ConfigMap": {"spec.data.train": [{"uri": "configmap://toy/train.jsonl"}]},
    "pinned code": {"spec.model": {"uri": f"hf://a/b@{COMMIT}", "trustRemoteCode": True}},
    "code on a claim": {"spec.model": {"uri": "pvc://models/x", "trustRemoteCode": True}},
    "no code": {"spec.model.trustRemoteCode": False},
    "merged": {"spec.output": {"mergeAdapter": True}},
    "not merged": {"spec.lora": REMOVE, "spec.tuning": "Full", "spec.output": {"mergeAdapter": False}},
    "evaluated": {**EVAL, "spec.evaluation": {"everySteps": 5}},
    "evaluated at the end": EVAL,
    "epochs": {"spec.training": {"epochs": 0.5}},
    "steps": {"spec.training": {"maxSteps": 5, "warmupSteps": 5}},
    "on the CPU": {"spec.resources": {"gpusPerNode": 0, "processesPerNode": 2}},
    "many GPUs": {"spec.resources": {"nodes": 2, "gpusPerNode": 8, "cpu": "7500m", "memory": "1.5Ti"}},
    "grouped heads": {**PRETRAIN, "spec.model.scratch.kvHeads": 2},
    "own width of heads": {**PRETRAIN, "spec.model.scratch.hiddenSize": 100, "spec.model.scratch.headDim": 12},
    "made for its data": {**PRETRAIN, "spec.model.scratch.maxLength": 64, "spec.data.maxLength": 64},
    "made for short data": {**PRETRAIN, "spec.model.scratch.maxLength": 64},
    "environment": {
        "spec.env": [{"name": "NCCL_DEBUG", "value": "WARN"}, {"name": "TOKENIZERS_PARALLELISM", "value": ""}]
    },
    "zero stage by number": {"spec.deepspeed": {"zeroStage": 0}},
    "zero stage by word": {"spec.deepspeed": {"zeroStage": "Auto"}},
    "suspended": {"spec.suspend": True},
    **{
        f"bucket {uri}": {
            "spec.model": {"uri": uri, "secretRef": {"name": "x"}},
            "spec.data.train": [{"uri": uri, "secretRef": {"name": "x"}}],
            "spec.data.eval": [{"uri": uri}],
        }
        for uri in (
            "s3://bucket",
            "s3://my.bucket-1/a folder/x@y=z/part-0.jsonl",
            "gs://bucket_of-mine.org/a/",
            f"gs://{'b' * 222}/x",
            f"s3://{'b' * 63}/" + "k" * 955,
        )
    },
    "tokenizer in a bucket": {
        **PRETRAIN,
        "spec.model.scratch.tokenizer": {"uri": "s3://bucket/tok", "secretRef": {"name": "x"}},
    },
    "null is nothing": {"spec.tuning": None},
}

_SCHEME = "must be a URI of a scheme that works here"
_ESCAPE = "must not contain a .. step"
_HUB = "is for an hf:// uri only"
_FETCHED = "is for an hf:// or s3:// or gs:// uri only"
_PRETRAIN_ONLY = "is for stage Pretrain only"
_SFT_ONLY = "is for stage SFT only"
_ONE_MODEL = "needs exactly one of uri, fromJob, scratch"
_NAME = "must be a DNS-1035 label of at most 50 characters"
_TRAIN = "spec.data.train[0]"

REFUSED_BY_RULE: tuple[Refused, ...] = (
    Refused("name too long", {"metadata.name": LONGEST + "c"}, "metadata.name", _NAME),
    Refused("name starts with a digit", {"metadata.name": "1st"}, "metadata.name", _NAME),
    Refused("two model sources", {"spec.model.fromJob": {"name": "base"}}, "spec.model", _ONE_MODEL),
    Refused("no model source", {"spec.model": {"dtype": "FP32"}}, "spec.model", _ONE_MODEL),
    Refused("neither lora nor tuning", {"spec.lora": REMOVE}, "spec.tuning", "must be said outside stage Pretrain"),
    Refused("lora and full", {"spec.tuning": "Full"}, "spec.lora", "contradicts tuning: Full"),
    Refused(
        "scratch in sft",
        {"spec.model": {"scratch": SHAPE}, "spec.lora": REMOVE, "spec.tuning": "Full"},
        "spec.model.scratch",
        _PRETRAIN_ONLY,
    ),
    Refused(
        "scratch with lora", {**PRETRAIN, "spec.lora": {"rank": 8}}, "spec.tuning", "must be Full for a model made"
    ),
    Refused(
        "scratch with lora by word", {**PRETRAIN, "spec.tuning": "LoRA"}, "spec.tuning", "must be Full for a model made"
    ),
    Refused("split in sft", {"spec.data.tooLong": "Split"}, "spec.data.tooLong", _PRETRAIN_ONLY),
    Refused("completion in pretrain", {**CONTINUED, "spec.data.lossOn": "Completion"}, "spec.data.lossOn", _SFT_ONLY),
    Refused("chat in pretrain", {**CONTINUED, "spec.model.chatTemplate": "x"}, "spec.model.chatTemplate", _SFT_ONLY),
    Refused(
        "merge without adapter",
        {"spec.lora": REMOVE, "spec.tuning": "Full", "spec.output": {"mergeAdapter": True}},
        "spec.output.mergeAdapter",
        "needs an adapter",
    ),
    Refused("nothing to evaluate", {"spec.evaluation": {"everySteps": 5}}, "spec.evaluation.everySteps", "needs rows"),
    Refused(
        "code without a pin",
        {"spec.model": {"uri": "hf://a/b@main", "trustRemoteCode": True}},
        "spec.model.trustRemoteCode",
        "needs a model whose code is pinned",
    ),
    Refused(
        "code of a new model",
        {**PRETRAIN, "spec.model.trustRemoteCode": True},
        "spec.model.trustRemoteCode",
        "needs a model whose code is pinned",
    ),
    Refused(
        "heads in no groups",
        {**PRETRAIN, "spec.model.scratch.kvHeads": 3},
        "spec.model.scratch.kvHeads",
        "must divide heads",
    ),
    Refused("odd heads", {**PRETRAIN, "spec.model.scratch.headDim": 33}, "spec.model.scratch.headDim", "must be even"),
    Refused(
        "broken heads", {**PRETRAIN, "spec.model.scratch.hiddenSize": 100}, "spec.model.scratch.headDim", "must be even"
    ),
    Refused(
        "longer than the model",
        {**PRETRAIN, "spec.model.scratch.maxLength": 64, "spec.data.maxLength": 65},
        "spec.data.maxLength",
        "must not be more than model.scratch.maxLength",
    ),
    Refused(
        "from itself",
        {"spec.model": {"fromJob": {"name": "my-job"}}},
        "spec.model.fromJob.name",
        "must not name the job itself",
    ),
    Refused(
        "checkpoint from itself",
        {"spec.checkpoint": {"from": {"fromJob": {"name": "my-job"}}}},
        "spec.checkpoint.from.fromJob.name",
        "must not name the job itself",
    ),
    Refused(
        "two checkpoints",
        {"spec.checkpoint": {"from": {"fromJob": {"name": "base"}, "uri": "pvc://a/b"}}},
        "spec.checkpoint.from",
        "needs exactly one of fromJob, uri",
    ),
    Refused(
        "epochs and steps", {"spec.training": {"epochs": 1, "maxSteps": 5}}, "spec.training.maxSteps", "excludes epochs"
    ),
    Refused(
        "warm-up longer than training",
        {"spec.training": {"warmupSteps": 6, "maxSteps": 5}},
        "spec.training.warmupSteps",
        "must not be more than maxSteps",
    ),
    Refused(
        "no GPUs, no processes",
        {"spec.resources": {"gpusPerNode": 0}},
        "spec.resources.processesPerNode",
        "goes with gpusPerNode: 0",
    ),
    Refused(
        "GPUs and processes",
        {"spec.resources": {"processesPerNode": 2}},
        "spec.resources.processesPerNode",
        "goes with gpusPerNode: 0",
    ),
    *(
        Refused(
            f"secret {name}", {"spec.env": [{"name": name, "value": "x"}]}, "spec.env[0].name", "must not name a secret"
        )
        for name in ("HF_TOKEN", "token", "WANDB_API_KEY", "aws_secret_access_key", "DB_Password", "SECRET", "X_APIKEY")
    ),
    *(
        Refused(
            f"owned {name}",
            {"spec.env": [{"name": name, "value": "x"}]},
            "spec.env[0].name",
            "is set by the job itself",
        )
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "PET_NNODES", "POSTTRAIN_ALLOW_CPU")
    ),
    *(
        Refused(f"model {uri}", {"spec.model.uri": uri}, "spec.model.uri", _SCHEME)
        for uri in (
            *("s3://", "s3:///x", "s3://ab", "s3://Bucket/x", "s3://b_ucket/x", "s3://-bucket/x", "s3://bucket-/x"),
            *("s3://bucket//x", "s3://bucket/x?versionId=1", "s3://bucket/x#y", "s3://bucket/x\n", "s3a://bucket/x"),
            *("gs://", "gs://ab/x", "gs://Bucket/x", "gs://_bucket/x", "gs://bucket/a//b", f"s3://{'b' * 64}/x"),
            "Qwen/Qwen3",
            "file:///etc",
            "https://x/y",
            "hf://",
            "hf://a/b/c",
            "pvc:///x",
            "pvc://Claim/x",
            "pvc://a//b",
            "image://models/x",
            "configmap://a/b",
            "hf://a/b\n",
        )
    ),
    *(
        Refused(f"data {uri}", {"spec.data.train": [{"uri": uri}]}, f"{_TRAIN}.uri", _SCHEME)
        for uri in ("s3://B/x", "gs://bucket/x?y", "image:///data", "configmap://a", "configmap://a/b/c", "train.jsonl")
    ),
    Refused("evaluation data", {"spec.data.eval": [{"uri": "s3://b/x"}]}, "spec.data.eval[0].uri", _SCHEME),
    Refused(
        "tokenizer",
        {**PRETRAIN, "spec.model.scratch.tokenizer": {"uri": "x"}},
        "spec.model.scratch.tokenizer.uri",
        _SCHEME,
    ),
    Refused(
        "checkpoint on the hub", {"spec.checkpoint": {"from": {"uri": "hf://a/b"}}}, "spec.checkpoint.from.uri", _SCHEME
    ),
    Refused("model escapes", {"spec.model.uri": "pvc://models/../x"}, "spec.model.uri", _ESCAPE),
    Refused("bucket escapes", {"spec.model.uri": "s3://bucket/../x"}, "spec.model.uri", _ESCAPE),
    Refused("data escape a bucket", {"spec.data.train": [{"uri": "gs://bucket/a/.."}]}, f"{_TRAIN}.uri", _ESCAPE),
    Refused(
        "checkpoint in a bucket",
        {"spec.checkpoint": {"from": {"uri": "s3://bucket/x"}}},
        "spec.checkpoint.from.uri",
        _SCHEME,
    ),
    Refused("image escapes", {"spec.model.uri": "image:///models/.."}, "spec.model.uri", _ESCAPE),
    Refused("data escapes", {"spec.data.train": [{"uri": "pvc://a/.."}]}, f"{_TRAIN}.uri", _ESCAPE),
    Refused("evaluation escapes", {"spec.data.eval": [{"uri": "pvc://a/../b"}]}, "spec.data.eval[0].uri", _ESCAPE),
    Refused("key escapes", {"spec.data.train": [{"uri": "configmap://a/.."}]}, f"{_TRAIN}.uri", _ESCAPE),
    Refused(
        "checkpoint escapes",
        {"spec.checkpoint": {"from": {"uri": "pvc://a/../b"}}},
        "spec.checkpoint.from.uri",
        _ESCAPE,
    ),
    Refused(
        "tokenizer escapes",
        {**PRETRAIN, "spec.model.scratch.tokenizer": {"uri": "pvc://a/../b"}},
        "spec.model.scratch.tokenizer.uri",
        _ESCAPE,
    ),
    Refused(
        "secret of a folder",
        {"spec.model": {"uri": "pvc://a", "secretRef": {"name": "x"}}},
        "spec.model.secretRef",
        _FETCHED,
    ),
    Refused(
        "secret of a job",
        {"spec.model": {"fromJob": {"name": "b"}, "secretRef": {"name": "x"}}},
        "spec.model.secretRef",
        _FETCHED,
    ),
    Refused(
        "secret of a tokenizer",
        {**PRETRAIN, "spec.model.scratch.tokenizer": {"uri": "pvc://a", "secretRef": {"name": "x"}}},
        "spec.model.scratch.tokenizer.secretRef",
        _FETCHED,
    ),
    *(
        Refused(
            f"{kind} {name}",
            {f"spec.data.{kind}": [{"uri": "pvc://a/b", name: value}]},
            f"spec.data.{kind}[0].{name}",
            _FETCHED if name == "secretRef" else _HUB,
        )
        for kind in ("train", "eval")
        for name, value in (("secretRef", {"name": "x"}), ("split", "train"), ("subset", "main"))
    ),
    Refused("split of a bucket", {"spec.data.train": [{"uri": "s3://bkt/x", "split": "a"}]}, f"{_TRAIN}.split", _HUB),
)

REFUSED_BY_SCHEMA: tuple[Refused, ...] = (
    Refused("rank 0", {"spec.lora.rank": 0}, "spec.lora.rank", "1"),
    Refused("rank 513", {"spec.lora.rank": 513}, "spec.lora.rank", "512"),
    Refused("rank as text", {"spec.lora.rank": "16"}, "spec.lora.rank", "must be"),
    Refused("rank with a fraction", {"spec.lora.rank": 16.5}, "spec.lora.rank", "must be"),
    Refused("later stage", {"spec.stage": "Preference"}, "spec.stage", "Pretrain"),
    Refused("no stage", {"spec.stage": REMOVE}, "spec.stage", "equired"),
    Refused("no storage", {"spec.storage": REMOVE}, "spec.storage", "equired"),
    Refused("no claim", {"spec.storage": {}}, "spec.storage.claimName", "equired"),
    Refused("no data", {"spec.data": {}}, "spec.data.train", "equired"),
    Refused("no sets", {"spec.data.train": []}, "spec.data.train", "at least 1"),
    Refused("later precision", {"spec.training": {"precision": "BF16"}}, "spec.training.precision", "FP32"),
    Refused("learning rate 0", {"spec.training": {"learningRate": 0}}, "spec.training.learningRate", "than 0"),
    Refused(
        "learning rate as text", {"spec.training": {"learningRate": "1e-5"}}, "spec.training.learningRate", "number"
    ),
    Refused("one beta", {"spec.training": {"betas": [0.9]}}, "spec.training.betas", "at least 2"),
    Refused("beta 1", {"spec.training": {"betas": [0.9, 1]}}, "spec.training.betas[1]", "less than 1"),
    Refused("zero stage 4", {"spec.deepspeed": {"zeroStage": 4}}, "spec.deepspeed.zeroStage", "Auto"),
    Refused("zero stage as text", {"spec.deepspeed": {"zeroStage": "2"}}, "spec.deepspeed.zeroStage", "Auto"),
    Refused("zero stage true", {"spec.deepspeed": {"zeroStage": True}}, "spec.deepspeed.zeroStage", "must be"),
    Refused("half a core", {"spec.resources": {"cpu": 0.5}}, "spec.resources.cpu", "must be"),
    Refused("memory in words", {"spec.resources": {"memory": "much"}}, "spec.resources.memory", "must be"),
    Refused("negative memory", {"spec.resources": {"memory": "-1Gi"}}, "spec.resources.memory", "must be"),
    Refused("number as text", {"spec.suspend": "true"}, "spec.suspend", "must be"),
    Refused("capital in a claim", {"spec.storage.claimName": "Runs"}, "spec.storage.claimName", "match"),
    Refused(
        "variable twice", {"spec.env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "spec.env", "A"
    ),
    Refused("bad variable", {"spec.env": [{"name": "a b", "value": "1"}]}, "spec.env[0].name", "match"),
    Refused("list for a map", {"spec.model": ["hf://a/b"]}, "spec.model", "must be"),
    Refused("too many sets", {"spec.data.train": [{"uri": "pvc://a/b"}] * 17}, "spec.data.train", "at most 16"),
)

UNKNOWN: tuple[Refused, ...] = (
    Refused("at the root", {"specs": {}}, "specs", "unknown field"),
    Refused("in metadata", {"metadata.lables": {}}, "metadata.lables", "unknown field"),
    Refused("typo", {"spec.lora.rnak": 3}, "spec.lora.rnak", "unknown field"),
    Refused("later block", {"spec.grpo": {"groupSize": 8}}, "spec.grpo", "unknown field"),
    Refused("later field", {"spec.lora.dora": True}, "spec.lora.dora", "unknown field"),
    Refused("later size", {"spec.storage.size": "1Ti"}, "spec.storage.size", "unknown field"),
    Refused("in a list", {"spec.data.train.0.weight": 2}, f"{_TRAIN}.weight", "unknown field"),
)
