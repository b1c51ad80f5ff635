"""Which rows are trained on, how they are read, and what becomes of those that do not fit."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain_api.spec.fields import SpecModel, optional, required
from posttrain_api.spec.objectives import ColumnName
from posttrain_api.spec.references import MAX_URI, SECRET, ObjectRef

MAX_SOURCES = 16


class Columns(SpecModel):
    """Our names for the data's columns; what is not named is looked for under our own name."""

    text: ColumnName | None = optional("Column with plain text", default="text", example="content")
    messages: ColumnName | None = optional(
        "Column with a list of {role, content}", default="messages", example="conversation"
    )
    prompt: ColumnName | None = optional("Column with the prompt", default="prompt", example="question")
    completion: ColumnName | None = optional("Column with the answer to learn", default="completion", example="answer")
    chosen: ColumnName | None = optional(
        "Column with the better answer, a text or a list of {role, content}", default="chosen", example="preferred"
    )
    rejected: ColumnName | None = optional(
        "Column with the worse answer, as chosen", default="rejected", example="dispreferred"
    )
    instruction: ColumnName | None = optional(
        "Column with the task of an Alpaca row", default="instruction", example="task"
    )
    input: ColumnName | None = optional(
        "Column with the context of an Alpaca row; may be empty or missing", default="input", example="context"
    )
    output: ColumnName | None = optional(
        "Column with the answer of an Alpaca row", default="output", example="response"
    )
    conversations: ColumnName | None = optional(
        "Column with a ShareGPT list of {from, value}", default="conversations", example="dialogue"
    )


class DataSource(SpecModel):
    """One data set: a file or a folder of files (of a claim or a bucket), a hub data set, or a key of a ConfigMap."""

    uri: str = required(
        "Where the rows are: pvc://claim/path, s3://bucket/key or gs://bucket/key (a file or a folder of files), "
        "hf://org/name[@revision], or configmap://name/key for small sets",
        example="pvc://datasets/gsm8k/train.jsonl",
        min_length=1,
        max_length=MAX_URI,
    )
    secret_ref: ObjectRef | None = optional(
        SECRET, default="s3:// and gs://: the pod's own identity, else none", example={"name": "hf-token"}
    )
    split: str | None = optional(
        "Split of an hf:// data set",
        default="train, for eval: validation, else test",
        example="train",
        min_length=1,
        max_length=128,
    )
    subset: str | None = optional(
        "Subset (configuration) of an hf:// data set", example="main", min_length=1, max_length=128
    )
    format: Literal["Auto", "JSONL", "Parquet", "Arrow"] | None = optional(
        "Format of the files; Auto goes by their names", default="Auto", example="JSONL"
    )
    columns: Columns | None = optional(
        "Which of the data's columns are meant: our name on the left, the data's on the right",
        default="our own names",
        example={"prompt": "question", "completion": "answer"},
    )
    weight: float | None = optional(
        "How often each row is seen per epoch: 2 is twice, 0.5 is half of the rows (training sets only)",
        unit="passes per epoch",
        default="1",
        example=2,
        gt=0,
        le=1000,
    )
    max_rows: int | None = optional(
        "Read at most so many rows, from the start", unit="rows", default="all", example=1000, ge=1, le=10**12
    )


class BadRows(SpecModel):
    """What happens to rows that cannot be used; each is counted by reason in status.dataReport."""

    policy: Literal["Fail", "Skip"] | None = optional(
        "Fail ends the job at the first bad row (DataRowsRejected), Skip leaves bad rows out up to maxFraction",
        default="Fail",
        example="Skip",
    )
    max_fraction: float | None = optional(
        "Under Skip: the job fails where a larger share of the rows is bad",
        unit="share of all rows",
        default="0.001",
        example=0.01,
        ge=0,
        le=1,
    )


class Data(SpecModel):
    """The rows: training sets, evaluation sets, and how they are cut and counted."""

    train: Annotated[tuple[DataSource, ...], Field(min_length=1, max_length=MAX_SOURCES)] = required(
        "Data sets to train on, read one after the other and shuffled together",
        example=[{"uri": "pvc://datasets/gsm8k/train.jsonl"}],
    )
    eval: Annotated[tuple[DataSource, ...], Field(min_length=1, max_length=MAX_SOURCES)] | None = optional(
        "Data sets to evaluate on: the loss, in stage RL the reward of sampled completions",
        default="none",
        example=[{"uri": "pvc://datasets/gsm8k/test.jsonl"}],
    )
    max_length: int | None = optional(
        "Longest sequence, prompt and answer together. Stage RL: prompts have what rollout.maxNewTokens leaves of it",
        unit="tokens",
        default="2048; RL: maxPromptLength (1536 unless said) + rollout.maxNewTokens",
        example=1024,
        ge=8,
        le=1048576,
    )
    max_prompt_length: int | None = optional(
        "Longest prompt; a row with a longer one is too long, and is never cut to it (not for stage Pretrain, nor with "
        "lossOn Assistant or All)",
        unit="tokens",
        default="no limit but maxLength; RL: what rollout.maxNewTokens leaves of maxLength",
        example=512,
        ge=1,
        le=1048576,
    )
    loss_on: Literal["Auto", "Completion", "Assistant", "All"] | None = optional(
        "Which tokens are learned. Auto: in Pretrain all, in SFT the last answer (the prompt is never counted); "
        "Assistant: every assistant turn of rows with messages",
        default="Auto",
        example="Completion",
    )
    too_long: Literal["Skip", "Split", "Truncate", "Fail"] | None = optional(
        "What happens to sequences above maxLength; Split (Pretrain only) cuts them into pieces, Truncate (not in RL) "
        "cuts them off. "
        "They are counted apart from bad rows",
        default="Skip; Pretrain: Split",
        example="Truncate",
    )
    too_long_max_fraction: float | None = optional(
        "The job fails where a larger share of the rows is too long",
        unit="share of all rows",
        default="0.1",
        example=0.05,
        ge=0,
        le=1,
    )
    bad_rows: BadRows | None = optional(
        "What happens to rows that cannot be used", example={"policy": "Skip", "maxFraction": 0.01}
    )
