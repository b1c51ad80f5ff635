"""References: where a model, a tokenizer, a data set's secret or an earlier job is.

A reference says where something is, never how it gets there: the plan turns `pvc://` into a mount and leaves `hf://`,
`s3://` and `gs://` to the trainer's `prepare`. The forms a URI may have are rules (rules/), because a rule can say what
to write instead and a pattern cannot.
"""

from __future__ import annotations

from typing import Literal

from posttrain_api.spec.fields import JOB_NAME, MAX_JOB_NAME, ObjectName, SpecModel, optional, required

MAX_URI = 1024
SECRET = (
    "Secret of the job's namespace, mounted in the first pod only. hf://: the key `token`. s3://: AWS_ACCESS_KEY_ID, "
    "AWS_SECRET_ACCESS_KEY, and where needed AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL. gs://: credentials.json "
    "(a service account's key), and where needed GCS_ENDPOINT_URL"
)


class ObjectRef(SpecModel):
    """An object of the job's namespace, by name."""

    name: ObjectName = required("Name of the object in the job's namespace", example="hf-token")


class JobRef(SpecModel):
    """Another PostTrainingJob of the same namespace, by name."""

    name: str = required(
        "Name of a PostTrainingJob in the same namespace; this job waits (Suspended, "
        "WaitingForDependency) until it has succeeded",
        example="base-pretrain",
        min_length=1,
        max_length=MAX_JOB_NAME,
        pattern=JOB_NAME,
    )


class FinishedJobRef(JobRef):
    """Another PostTrainingJob of the same namespace, by name; it may have failed."""

    name: str = required(
        "Name of a PostTrainingJob in the same namespace; this job waits (Suspended, "
        "WaitingForDependency) until it has succeeded or failed",
        example="base-pretrain",
        min_length=1,
        max_length=MAX_JOB_NAME,
        pattern=JOB_NAME,
    )


class ModelJobRef(JobRef):
    """The model that another PostTrainingJob of the same namespace has trained."""

    checkpoint: Literal["Output", "Best"] | None = optional(
        "Output: what it exported at its end. Best: the model of its best evaluation (it needs evaluation.keepBest)",
        default="Output",
        example="Best",
    )


class TokenizerRef(SpecModel):
    """A ready tokenizer for a model made from scratch."""

    uri: str = required(
        "Where the tokenizer is: hf://org/name[@revision], s3://bucket/folder, gs://bucket/folder, pvc://claim/path or "
        "image:///absolute/path (baked into the image)",
        example="hf://Qwen/Qwen3-0.6B",
        min_length=1,
        max_length=MAX_URI,
    )
    secret_ref: ObjectRef | None = optional(
        SECRET, default="s3:// and gs://: the pod's own identity, else none", example={"name": "hf-token"}
    )


class Scratch(SpecModel):
    """A model made from its shape, its weights drawn from training.seed (Pretrain only)."""

    family: Literal["Llama", "Qwen3"] = required("Architecture of the new model", example="Llama")
    vocab_size: int = required(
        "Size of the vocabulary; without `tokenizer` a byte-level BPE tokenizer of this size is "
        "trained from the training data",
        unit="tokens",
        example=4096,
        ge=261,
        le=1048576,
    )
    hidden_size: int = required("Width of the residual stream", example=256, ge=8, le=65536)
    intermediate_size: int | None = optional(
        "Width of the feed-forward layers", default="4 x hiddenSize", example=1024, ge=8, le=262144
    )
    layers: int = required("Number of transformer layers", example=4, ge=1, le=512)
    heads: int = required("Number of attention heads", example=8, ge=1, le=1024)
    kv_heads: int | None = optional(
        "Number of key and value heads (grouped-query attention); divides heads",
        default="heads",
        example=4,
        ge=1,
        le=1024,
    )
    head_dim: int | None = optional("Width of one head, even", default="hiddenSize / heads", example=32, ge=2, le=1024)
    max_length: int | None = optional(
        "Longest sequence the model is made for",
        unit="tokens",
        default="data.maxLength",
        example=2048,
        ge=8,
        le=1048576,
    )
    tokenizer: TokenizerRef | None = optional(
        "A ready tokenizer to use",
        default="one is trained from the training data",
        example={"uri": "hf://Qwen/Qwen3-0.6B"},
    )


class ModelRef(SpecModel):
    """The model that training starts from: exactly one of uri, fromJob and scratch."""

    uri: str | None = optional(
        "Where the model is: hf://org/name[@revision], s3://bucket/folder, gs://bucket/folder, pvc://claim/path or "
        "image:///absolute/path (baked into the image). What is fetched is pinned for all attempts and shown in "
        "status.model.resolvedRevision: the commit, of a bucket a digest of names, sizes and times",
        example="hf://Qwen/Qwen2.5-1.5B-Instruct",
        min_length=1,
        max_length=MAX_URI,
    )
    from_job: ModelJobRef | None = optional(
        "Start from the output of another job of this namespace; its claim is mounted read-only. Where that is an "
        "adapter, it is merged in memory into the model it was trained on",
        example={"name": "base-pretrain"},
    )
    scratch: Scratch | None = optional(
        "Make a new model of this shape (stage Pretrain only)",
        example={"family": "Llama", "vocabSize": 4096, "hiddenSize": 256, "layers": 4, "heads": 8},
    )
    secret_ref: ObjectRef | None = optional(
        SECRET, default="s3:// and gs://: the pod's own identity, else none", example={"name": "hf-token"}
    )
    attention: Literal["Auto", "SDPA", "Eager"] | None = optional(
        "Attention kernel; Auto takes SDPA, torch's own. Eager writes the products out, which is slower",
        default="Auto",
        example="SDPA",
    )
    trust_remote_code: bool | None = optional(
        "Run Python code that comes with the model; an hf:// URI must then be pinned to a 40-character commit",
        default="false",
        example=True,
    )
    chat_template: str | None = optional(
        "Jinja chat template instead of the tokenizer's own (rows with messages; not for stage Pretrain)",
        default="the tokenizer's",
        example="{% for m in messages %}{{ m.content }}{% endfor %}",
        min_length=1,
        max_length=16384,
    )


class ReferenceRef(SpecModel):
    """A model beside the one that is trained: exactly one of uri and fromJob."""

    uri: str | None = optional(
        "Where the model is: hf://org/name[@revision], s3://bucket/folder, gs://bucket/folder, pvc://claim/path or "
        "image:///absolute/path (baked into the image). Its tokenizer must be that of the starting model",
        example="hf://Qwen/Qwen2.5-1.5B-Instruct",
        min_length=1,
        max_length=MAX_URI,
    )
    from_job: ModelJobRef | None = optional(
        "The output of another job of this namespace; its claim is mounted read-only", example={"name": "sft"}
    )
    secret_ref: ObjectRef | None = optional(
        SECRET, default="s3:// and gs://: the pod's own identity, else none", example={"name": "hf-token"}
    )
