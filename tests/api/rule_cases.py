"""One table of accepted and refused jobs, run through parse_job and through a real API server.

A case is a change to the smallest useful job. Both readers must say the same; for refused ones the message is compared
too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_api.deepspeed_keys import OWNED
from posttrain_api.spec.deepspeed import BLOCKS, FLAGS, refused_paths
from tests.api.case_kit import BASE, COMMIT, LONGEST, REMOVE, Refused, job
from tests.api.guard_cases import ACCEPTED_GUARDS, REFUSED_GUARDS, REFUSED_GUARDS_BY_SCHEMA
from tests.api.online_cases import ACCEPTED_ONLINE, REFUSED_ONLINE, REFUSED_ONLINE_BY_SCHEMA, RL

__all__ = ["ACCEPTED", "BASE", "COMMIT", "REFUSED_BY_RULE", "REFUSED_BY_SCHEMA", "REMOVE", "RL", "UNKNOWN", "job"]

SHAPE = {"family": "Llama", "vocabSize": 4096, "hiddenSize": 256, "layers": 4, "heads": 8}
PRETRAIN = {"spec.stage": "Pretrain", "spec.lora": REMOVE, "spec.model": {"scratch": SHAPE}}
CONTINUED = {"spec.stage": "Pretrain", "spec.lora": REMOVE}
EVAL = {"spec.data.eval": [{"uri": "pvc://datasets/test.jsonl"}]}
PREFERENCE = {"spec.stage": "Preference"}
REWARD = {"spec.stage": "RewardModel"}
CHAIN = {"spec.model": {"fromJob": {"name": "base"}}, "spec.lora": {"continueAdapter": True}}
BEST = {**EVAL, "spec.evaluation": {"everySteps": 5, "keepBest": True}}
NF4 = {"spec.lora.quantization": "NF4"}
FP32 = {"spec.training": {"precision": "FP32"}}
ON_CPU = {"spec.resources": {"gpusPerNode": 0, "processesPerNode": 1}}


def refused_override(path: str) -> dict[str, Any]:
    """deepspeed.overrides with a value of the kind that the key usually has."""
    *parents, name = path.split(".")
    value: Any = True if name in FLAGS else {"enabled": True} if name in BLOCKS else 5
    for key in reversed([*parents, name]):
        value = {key: value}
    return {"spec.deepspeed": {"overrides": value}}


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
    "a claim of its own": {"spec.storage": {"size": "200Gi"}},
    "a claim of its own, all said": {
        "spec.storage": {"size": 1024, "storageClassName": "fast", "accessMode": "ReadWriteMany", "retain": False},
        "spec.resources": {"nodes": 2, "gpusPerNode": 8},
    },
    "a claim for one node": {"spec.storage": {"size": "1.5Ti", "accessMode": "ReadWriteOnce"}},
    "a claim for two nodes": {"spec.storage": {"size": "1Gi"}, "spec.resources": {"nodes": 2}},
    "checkpoints over the node's disk": {"spec.checkpoint": {"staging": "Disk"}},
    "checkpoints over the pod's memory": {"spec.checkpoint": {"staging": "Memory", "everySteps": 10}},
    "checkpoint by path": {"spec.checkpoint": {"from": {"uri": "pvc://runs/base/3f/checkpoints/step-1"}}},
    "restarts, some": {"spec.runPolicy.restarts": {"total": 0, "hang": 1000}},
    "restarts, all": {
        "spec.runPolicy.restarts": {"total": 5, "outOfMemory": 0, "hang": 1, "processKilled": 2, "trainerError": 3}
    },
    "restarts, none said": {"spec.runPolicy.restarts": {}},
    "hub data": {"spec.data.train": [{"uri": "hf://openai/gsm8k", "subset": "main", "split": "train"}]},
    "hub data to evaluate on": {
        "spec.data.eval": [
            {"uri": "hf://a/b", "subset": "main", "split": "test", "secretRef": {"name": "hf-token"}},
        ],
    },
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
    "zero stage by number": {"spec.deepspeed": {"zeroStage": 2}},
    "zero stage 0 in FP32": {"spec.deepspeed": {"zeroStage": 0}, **FP32},
    "zero stage 0 on the CPU": {"spec.deepspeed": {"zeroStage": 0}, **ON_CPU},
    "bf16": {"spec.training": {"precision": "BF16", "gradientCheckpointing": True}},
    "bf16 on the CPU": {"spec.training": {"precision": "BF16"}, **ON_CPU},
    "offloaded": {"spec.deepspeed": {"zeroStage": 3, "offloadOptimizer": True, "offloadParameters": True}},
    "optimizer offloaded, stage by prepare": {"spec.deepspeed": {"offloadOptimizer": True}},
    "nothing offloaded": {"spec.deepspeed": {"offloadOptimizer": False, "offloadParameters": False, "zeroStage": 0}}
    | FP32,
    "overrides": {
        "spec.deepspeed": {
            "overrides": {
                "wall_clock_breakdown": True,
                "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
                "zero_optimization": {
                    "reduce_bucket_size": 5e7,
                    "offload_optimizer": {"pin_memory": False},
                    "offload_param": {"pin_memory": False},
                },
            }
        }
    },
    "no overrides": {"spec.deepspeed": {"overrides": {}}},
    "reward model": REWARD,
    "reward model with words": {**REWARD, "spec.rewardModel": {"centering": 0.01, "marginColumn": "m"}},
    "reward model of an adapter job": {**REWARD, **CHAIN},
    "preference": PREFERENCE,
    "dpo": {**PREFERENCE, "spec.algorithm": "DPO", "spec.preference": {"beta": 0.3, "sftWeight": 0.1}},
    "cdpo": {**PREFERENCE, "spec.preference": {"labelSmoothing": 0.1}},
    "cdpo, said": {**PREFERENCE, "spec.algorithm": "DPO", "spec.preference": {"labelSmoothing": 0}},
    "robust dpo": {**PREFERENCE, "spec.algorithm": "RobustDPO", "spec.preference": {"labelSmoothing": 0.1}},
    **{
        f"algorithm {name}": {**PREFERENCE, "spec.algorithm": name, "spec.preference": {"cacheReference": True}}
        for name in ("IPO", "Hinge", "APOZero", "APODown")
    },
    "simpo": {**PREFERENCE, "spec.algorithm": "SimPO", "spec.preference": {"gammaBetaRatio": 0.3}},
    "simpo caches nothing": {**PREFERENCE, "spec.algorithm": "SimPO", "spec.preference": {"cacheReference": False}},
    "reference by uri": {**PREFERENCE, "spec.reference": {"uri": "hf://a/b", "secretRef": {"name": "hf-token"}}},
    "reference by job": {**PREFERENCE, "spec.reference": {"fromJob": {"name": "base", "checkpoint": "Best"}}},
    "best of another job": {"spec.model": {"fromJob": {"name": "base", "checkpoint": "Best"}}},
    "output of another job": {"spec.model": {"fromJob": {"name": "base", "checkpoint": "Output"}}},
    "adapter trained further": CHAIN,
    "new adapter on another": {**CHAIN, "spec.lora": {"continueAdapter": False, "rank": 4}},
    "rank-stabilised": {"spec.lora": {"rslora": True, "dora": True}},
    "in 4 bits": {"spec.lora": {"quantization": "NF4", "dora": True}, "spec.deepspeed": {"zeroStage": 2}},
    "in 4 bits, stage by prepare": {"spec.lora": {"quantization": "NF4"}, "spec.deepspeed": {"zeroStage": "Auto"}},
    "in 4 bits, optimizer offloaded": {**NF4, "spec.deepspeed": {"offloadOptimizer": True}},
    "adapter trained further in 4 bits": {**CHAIN, "spec.lora": {"continueAdapter": True, "quantization": "NF4"}},
    "sharded weights, none in 4 bits": {"spec.deepspeed": {"zeroStage": 3}},
    "best is kept": BEST,
    "best by accuracy": {
        **EVAL,
        "spec.evaluation": {"everySteps": 5, "keepBest": True, "metric": "eval_accuracy", "goal": "Maximize"},
    },
    "best by loss, said": {**EVAL, "spec.evaluation": {"everySteps": 5, "keepBest": True, "metric": "eval_loss"}},
    "best not kept": {**EVAL, "spec.evaluation": {"keepBest": False}},
    "weighted": {"spec.data.train": [{"uri": "pvc://a/b", "weight": 0.5}, {"uri": "pvc://a/c", "weight": 2}]},
    "short prompts": {"spec.data.maxPromptLength": 10, "spec.data.maxLength": 11},
    "short prompts, the answer counted": {"spec.data.maxPromptLength": 10, "spec.data.lossOn": "Completion"},
    "short prompts of pairs": {**PREFERENCE, "spec.data.maxPromptLength": 10},
    "all turns": {"spec.data.lossOn": "Assistant"},
    "loss as the stage says": {**PREFERENCE, "spec.data.lossOn": "Auto"},
    "all tokens of sft": {"spec.data.lossOn": "All"},
    "columns": {
        **PREFERENCE,
        "spec.data.train": [{"uri": "pvc://a/b", "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}}],
    },
    "columns of alpaca": {
        "spec.data.train": [{"uri": "pvc://a/b", "columns": {"instruction": "a", "input": "b", "output": "c"}}]
    },
    "columns of sharegpt": {"spec.data.train": [{"uri": "pvc://a/b", "columns": {"conversations": "c"}}]},
    "chat template of pairs": {**REWARD, "spec.model.chatTemplate": "{{ messages }}"},
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
    **ACCEPTED_ONLINE,
    **ACCEPTED_GUARDS,
}

_SCHEME = "must be a URI of a scheme that works here"
_ESCAPE = "must not contain a .. step"
_HUB = "is for an hf:// uri only"
_FETCHED = "is for an hf:// or s3:// or gs:// uri only"
_PRETRAIN_ONLY = "is for stage Pretrain only"
_SFT_ONLY = "is for stage SFT only"
_PREFERENCE_ONLY = "is for stage Preference only"
_COMPARED = "is for stages Preference and RL only"
_NOT_PRETRAIN = "is for stages SFT and RewardModel and Preference and RL only"
_OF_BEST = "decides what is kept as the best"
_SMOOTHED = "is for algorithm DPO and RobustDPO only"
_ONE_MODEL = "needs exactly one of uri, fromJob, scratch"
_NAME = "must be a DNS-1035 label of at most 50 characters"
_TRAIN = "spec.data.train[0]"

REFUSED_BY_RULE: tuple[Refused, ...] = (
    Refused("name too long", {"metadata.name": LONGEST + "c"}, "metadata.name", _NAME),
    Refused("name starts with a digit", {"metadata.name": "1st"}, "metadata.name", _NAME),
    Refused("two model sources", {"spec.model.fromJob": {"name": "base"}}, "spec.model", _ONE_MODEL),
    Refused("no model source", {"spec.model": {"attention": "SDPA"}}, "spec.model", _ONE_MODEL),
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
    Refused("all turns in pretrain", {**CONTINUED, "spec.data.lossOn": "Assistant"}, "spec.data.lossOn", _SFT_ONLY),
    Refused("completion of pairs", {**PREFERENCE, "spec.data.lossOn": "Completion"}, "spec.data.lossOn", _SFT_ONLY),
    Refused(
        "all tokens of pairs",
        {**REWARD, "spec.data.lossOn": "All"},
        "spec.data.lossOn",
        "is for stages Pretrain and SFT only",
    ),
    Refused(
        "chat in pretrain", {**CONTINUED, "spec.model.chatTemplate": "x"}, "spec.model.chatTemplate", _NOT_PRETRAIN
    ),
    Refused(
        "prompts in pretrain", {**CONTINUED, "spec.data.maxPromptLength": 9}, "spec.data.maxPromptLength", _NOT_PRETRAIN
    ),
    Refused(
        "prompt as long as all",
        {"spec.data.maxPromptLength": 9, "spec.data.maxLength": 9},
        "spec.data.maxPromptLength",
        "must be less than maxLength",
    ),
    *(
        Refused(
            f"prompts with loss on {loss_on}",
            {"spec.data.maxPromptLength": 9, "spec.data.lossOn": loss_on},
            "spec.data.maxPromptLength",
            "means nothing with lossOn Assistant or All",
        )
        for loss_on in ("Assistant", "All")
    ),
    Refused("algorithm in sft", {"spec.algorithm": "DPO"}, "spec.algorithm", _COMPARED),
    Refused("algorithm of a reward model", {**REWARD, "spec.algorithm": "IPO"}, "spec.algorithm", _COMPARED),
    Refused("preference in sft", {"spec.preference": {"beta": 1}}, "spec.preference", _PREFERENCE_ONLY),
    Refused("reference in sft", {"spec.reference": {"uri": "hf://a/b"}}, "spec.reference", _COMPARED),
    Refused(
        "reward in preference",
        {**PREFERENCE, "spec.rewardModel": {"centering": 1}},
        "spec.rewardModel",
        "is for stage RewardModel only",
    ),
    Refused(
        "scratch in preference", {**PREFERENCE, "spec.model": {"scratch": SHAPE}}, "spec.model.scratch", _PRETRAIN_ONLY
    ),
    Refused("split pairs", {**REWARD, "spec.data.tooLong": "Split"}, "spec.data.tooLong", _PRETRAIN_ONLY),
    Refused(
        "neither lora nor tuning in preference",
        {**PREFERENCE, "spec.lora": REMOVE},
        "spec.tuning",
        "must be said outside stage Pretrain",
    ),
    *(
        Refused(
            f"robust dpo {name}",
            {**PREFERENCE, "spec.algorithm": "RobustDPO", **block},
            "spec.preference.labelSmoothing",
            "must be more than 0 for RobustDPO",
        )
        for name, block in (
            ("bare", {}),
            ("without a share", {"spec.preference": {"beta": 1}}),
            ("with 0", {"spec.preference": {"labelSmoothing": 0}}),
        )
    ),
    Refused(
        "no smoothing left",
        {**PREFERENCE, "spec.preference": {"labelSmoothing": 0.5}},
        "spec.preference.labelSmoothing",
        "must be less than 0.5",
    ),
    *(
        Refused(
            f"smoothing of {name}",
            {**PREFERENCE, "spec.algorithm": name, "spec.preference": {"labelSmoothing": 0}},
            "spec.preference.labelSmoothing",
            _SMOOTHED,
        )
        for name in ("IPO", "Hinge", "APOZero", "APODown", "SimPO")
    ),
    *(
        Refused(
            f"ratio with {name}",
            {**PREFERENCE, **algorithm, "spec.preference": {"gammaBetaRatio": 1}},
            "spec.preference.gammaBetaRatio",
            "is for algorithm SimPO only",
        )
        for name, algorithm in (("no algorithm", {}), ("IPO", {"spec.algorithm": "IPO"}))
    ),
    Refused(
        "reference of simpo",
        {**PREFERENCE, "spec.algorithm": "SimPO", "spec.reference": {"uri": "hf://a/b"}},
        "spec.reference",
        "means nothing with SimPO",
    ),
    Refused(
        "cache of simpo",
        {**PREFERENCE, "spec.algorithm": "SimPO", "spec.preference": {"cacheReference": True}},
        "spec.preference.cacheReference",
        "means nothing with SimPO",
    ),
    Refused(
        "two references",
        {**PREFERENCE, "spec.reference": {"uri": "hf://a/b", "fromJob": {"name": "base"}}},
        "spec.reference",
        "needs exactly one of uri, fromJob",
    ),
    Refused("no reference", {**PREFERENCE, "spec.reference": {}}, "spec.reference", "needs exactly one of"),
    Refused(
        "reference to itself",
        {**PREFERENCE, "spec.reference": {"fromJob": {"name": "my-job"}}},
        "spec.reference.fromJob.name",
        "must not name the job itself",
    ),
    Refused("reference nowhere", {**PREFERENCE, "spec.reference": {"uri": "a/b"}}, "spec.reference.uri", _SCHEME),
    Refused(
        "reference escapes", {**PREFERENCE, "spec.reference": {"uri": "pvc://a/../b"}}, "spec.reference.uri", _ESCAPE
    ),
    Refused(
        "secret of a reference on a claim",
        {**PREFERENCE, "spec.reference": {"uri": "pvc://a/b", "secretRef": {"name": "x"}}},
        "spec.reference.secretRef",
        _FETCHED,
    ),
    Refused(
        "continues no job",
        {"spec.lora": {"continueAdapter": True}},
        "spec.lora.continueAdapter",
        "needs an earlier job whose adapter is trained further",
    ),
    *(
        Refused(
            f"continues with {name}",
            {**CHAIN, "spec.lora": {"continueAdapter": True, name: value}},
            "spec.lora.continueAdapter",
            "goes on with an adapter that has its shape already",
        )
        for name, value in (("rank", 4), ("alpha", 8), ("targetModules", ["x"]), ("rslora", True), ("dora", False))
    ),
    Refused(
        "best of one evaluation",
        {**EVAL, "spec.evaluation": {"keepBest": True}},
        "spec.evaluation.keepBest",
        "needs more than the one evaluation at the end",
    ),
    Refused(
        "best of nothing",
        {"spec.evaluation": {"keepBest": True, "everySteps": 5}},
        "spec.evaluation.everySteps",
        "needs rows",
    ),
    Refused(
        "metric for nothing", {**EVAL, "spec.evaluation": {"metric": "eval_loss"}}, "spec.evaluation.metric", _OF_BEST
    ),
    Refused("goal for nothing", {**EVAL, "spec.evaluation": {"goal": "Minimize"}}, "spec.evaluation.goal", _OF_BEST),
    Refused(
        "metric without a goal",
        {**EVAL, "spec.evaluation": {"everySteps": 5, "keepBest": True, "metric": "eval_accuracy"}},
        "spec.evaluation.goal",
        "must be said for another metric",
    ),
    Refused(
        "weighted evaluation",
        {"spec.data.eval": [{"uri": "pvc://a/b", "weight": 2}]},
        "spec.data.eval[0].weight",
        "is for training sets only",
    ),
    *(
        Refused(
            f"zero stage 0 {name}",
            {"spec.deepspeed": {"zeroStage": 0}, **more},
            "spec.deepspeed.zeroStage",
            "0 needs FP32",
        )
        for name, more in (
            ("on GPUs", {}),
            ("in BF16", {"spec.training": {"precision": "BF16"}}),
            ("in BF16 on the CPU", {"spec.training": {"precision": "BF16"}, **ON_CPU}),
        )
    ),
    Refused(
        "optimizer offloaded without zero",
        {"spec.deepspeed": {"zeroStage": 0, "offloadOptimizer": True}, **FP32},
        "spec.deepspeed.offloadOptimizer",
        "needs ZeRO",
    ),
    *(
        Refused(
            f"parameters offloaded at stage {stage}",
            {"spec.deepspeed": {"offloadParameters": True, **said}},
            "spec.deepspeed.offloadParameters",
            "needs zeroStage 3",
        )
        for stage, said in (("Auto", {}), ("Auto, said", {"zeroStage": "Auto"}), ("2", {"zeroStage": 2}))
    ),
    Refused(
        "4 bits at stage 3",
        {**NF4, "spec.deepspeed": {"zeroStage": 3}},
        "spec.deepspeed.zeroStage",
        "3 cannot be combined with lora.quantization",
    ),
    Refused(
        "4 bits with weights offloaded",
        {**NF4, "spec.deepspeed": {"zeroStage": 3, "offloadParameters": True}},
        "spec.deepspeed.zeroStage",
        "write 2 or Auto, and no offloadParameters",
    ),
    *(
        Refused(
            f"override {path}",
            refused_override(path),
            f"spec.deepspeed.overrides.{path}",
            "is set by the trainer itself" if path in OWNED else "was removed from DeepSpeed",
        )
        for path in refused_paths()
    ),
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
    Refused("no claim", {"spec.storage": {}}, "spec.storage", "needs exactly one of claimName, size"),
    Refused(
        "claim and size",
        {"spec.storage": {"claimName": "runs", "size": "1Gi"}},
        "spec.storage",
        "needs exactly one of claimName, size",
    ),
    *(
        Refused(
            f"{field} of a claim that is there",
            {"spec.storage": {"claimName": "runs", field: value}},
            f"spec.storage.{field}",
            "goes with size and only with it",
        )
        for field, value in (("storageClassName", "fast"), ("accessMode", "ReadWriteMany"), ("retain", False))
    ),
    Refused(
        "one node's claim for two",
        {"spec.storage": {"size": "1Gi", "accessMode": "ReadWriteOnce"}, "spec.resources": {"nodes": 2}},
        "spec.storage.accessMode",
        "must be ReadWriteMany for several nodes",
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
    *REFUSED_ONLINE,
    *REFUSED_GUARDS,
)

REFUSED_BY_SCHEMA: tuple[Refused, ...] = (
    Refused("restarts below 0", {"spec.runPolicy.restarts": {"total": -1}}, "spec.runPolicy.restarts.total", "0"),
    Refused(
        "restarts without end",
        {"spec.runPolicy.restarts": {"processKilled": 1001}},
        "spec.runPolicy.restarts.processKilled",
        "1000",
    ),
    Refused("restarts as a number", {"spec.runPolicy": {"restarts": 3}}, "spec.runPolicy.restarts", "must be"),
    Refused("rank 0", {"spec.lora.rank": 0}, "spec.lora.rank", "1"),
    Refused("rank 513", {"spec.lora.rank": 513}, "spec.lora.rank", "512"),
    Refused("rank as text", {"spec.lora.rank": "16"}, "spec.lora.rank", "must be"),
    Refused("rank with a fraction", {"spec.lora.rank": 16.5}, "spec.lora.rank", "must be"),
    Refused("no stage of ours", {"spec.stage": "KTO"}, "spec.stage", "Pretrain"),
    Refused("no algorithm of ours", {**PREFERENCE, "spec.algorithm": "KTO"}, "spec.algorithm", "SimPO"),
    Refused("beta 0", {**PREFERENCE, "spec.preference": {"beta": 0}}, "spec.preference.beta", "than 0"),
    Refused("weight 0", {"spec.data.train.0.weight": 0}, f"{_TRAIN}.weight", "than 0"),
    Refused(
        "vocabulary of 260", {**PRETRAIN, "spec.model.scratch.vocabSize": 260}, "spec.model.scratch.vocabSize", "261"
    ),
    Refused("metric in words", {**BEST, "spec.evaluation.metric": "the loss"}, "spec.evaluation.metric", "match"),
    Refused("overrides in a list", {"spec.deepspeed": {"overrides": []}}, "spec.deepspeed.overrides", "must be"),
    Refused(
        "no block below a key",
        {"spec.deepspeed": {"overrides": {"zero_optimization": {"offload_param": "cpu"}}}},
        "spec.deepspeed.overrides",
        "must have a block of fields at zero_optimization.offload_param",
    ),
    Refused(
        "too many overrides",
        {"spec.deepspeed": {"overrides": {f"key_{number}": 1 for number in range(65)}}},
        "spec.deepspeed.overrides",
        "at most 64",
    ),
    Refused(
        "too many overrides in a block",
        {"spec.deepspeed": {"overrides": {"zero_optimization": {f"key_{number}": 1 for number in range(65)}}}},
        "spec.deepspeed.overrides",
        "at most 64 fields at zero_optimization",
    ),
    Refused("no stage", {"spec.stage": REMOVE}, "spec.stage", "equired"),
    Refused("no storage", {"spec.storage": REMOVE}, "spec.storage", "equired"),
    Refused("size in words", {"spec.storage": {"size": "much"}}, "spec.storage.size", "must be"),
    Refused(
        "unknown access mode",
        {"spec.storage": {"size": "1Gi", "accessMode": "ReadOnlyMany"}},
        "spec.storage.accessMode",
        "ReadWriteMany",
    ),
    Refused("no data", {"spec.data": {}}, "spec.data.train", "equired"),
    Refused("no sets", {"spec.data.train": []}, "spec.data.train", "at least 1"),
    Refused("later precision", {"spec.training": {"precision": "FP16"}}, "spec.training.precision", "FP32"),
    Refused("learning rate 0", {"spec.training": {"learningRate": 0}}, "spec.training.learningRate", "than 0"),
    Refused(
        "learning rate as text", {"spec.training": {"learningRate": "1e-5"}}, "spec.training.learningRate", "number"
    ),
    Refused("one beta", {"spec.training": {"betas": [0.9]}}, "spec.training.betas", "at least 2"),
    Refused("beta 1", {"spec.training": {"betas": [0.9, 1]}}, "spec.training.betas[1]", "less than 1"),
    Refused("zero stage 4", {"spec.deepspeed": {"zeroStage": 4}}, "spec.deepspeed.zeroStage", "Auto"),
    Refused("zero stage as text", {"spec.deepspeed": {"zeroStage": "2"}}, "spec.deepspeed.zeroStage", "Auto"),
    Refused("no staging of ours", {"spec.checkpoint": {"staging": "Tmpfs"}}, "spec.checkpoint.staging", "Memory"),
    Refused("8 bits", {"spec.lora.quantization": "INT8"}, "spec.lora.quantization", "NF4"),
    Refused("bits as a number", {"spec.lora.quantization": 4}, "spec.lora.quantization", "must be"),
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
    *REFUSED_ONLINE_BY_SCHEMA,
    *REFUSED_GUARDS_BY_SCHEMA,
)

UNKNOWN: tuple[Refused, ...] = (
    Refused("at the root", {"specs": {}}, "specs", "unknown field"),
    Refused("in metadata", {"metadata.lables": {}}, "metadata.lables", "unknown field"),
    Refused("typo", {"spec.lora.rnak": 3}, "spec.lora.rnak", "unknown field"),
    Refused("dtype", {"spec.model.dtype": "FP32"}, "spec.model.dtype", "unknown field"),
    Refused("later block", {"spec.tracking": {}}, "spec.tracking", "unknown field"),
    Refused("later evaluation", {**EVAL, "spec.evaluation": {"generate": True}}, "spec.evaluation.generate", "unknown"),
    Refused("snake case", {"spec.data.max_length": 9}, "spec.data.max_length", "unknown field"),
    Refused(
        "scratch reference",
        {**PREFERENCE, "spec.reference": {"uri": "hf://a/b", "scratch": {}}},
        "spec.reference.scratch",
        "unknown field",
    ),
    Refused(
        "later offload", {"spec.deepspeed": {"hpzPartitionSize": 8}}, "spec.deepspeed.hpzPartitionSize", "unknown field"
    ),
    Refused("in a list", {"spec.data.train.0.wieght": 2}, f"{_TRAIN}.wieght", "unknown field"),
)
