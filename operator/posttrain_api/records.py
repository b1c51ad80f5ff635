"""What the trainer tells the operator: termination messages, the success record, progress reports.

Written by the trainer's launcher and reporter, read by the operator's observer and status server. Sizes are bounded
here, because Kubernetes cuts a termination message at 4 KiB and a cut JSON says nothing.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from posttrain_api.base import Model
from posttrain_api.reasons import Reason

MAX_TERMINATION_BYTES = 4096
MAX_LOG_TAIL_BYTES = 2048
MAX_REPORT_BYTES = 16384
MAX_METRICS = 32
MAX_STACKS_BYTES = 16384
"""Of the stacks of one rank, as they are sent and stored."""
MAX_STACKS = 64
"""Ranks of a job whose stacks are shown in its status."""
MAX_WHERE = 256
"""Characters of the one line that says where a rank is; the first line of its stacks."""


_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", re.ASCII)


def _check_time(text: str) -> str:
    if not _RFC3339.fullmatch(text):
        raise ValueError("must be RFC 3339 with a time zone, e.g. 2026-01-31T12:00:00Z")
    datetime.fromisoformat(text)  # ValueError for the 31st of February
    return text


# What is said here is copied into the status: what its schema refuses would keep the whole status from being written.
Whole = Annotated[int, Field(ge=0, le=2**62)]
Rank = Annotated[int, Field(ge=0, le=2**31 - 1)]
Time = Annotated[str, Field(max_length=40), AfterValidator(_check_time)]
Refusals = Annotated[dict[Annotated[str, Field(max_length=64)], Whole], Field(max_length=32)]


class Checkpoint(Model):
    """A committed checkpoint. `time` is RFC 3339 in UTC; `digest` is that of its manifest; `save_seconds`: from the
    moment the ranks began to save it until it was committed (None: not measured); `refused`: why newer ones were not
    resumed from, where an attempt fell back to this one."""

    step: Whole
    time: Time
    uri: str = Field(max_length=1024)
    size_bytes: Whole
    digest: str = Field(max_length=80)
    save_seconds: float | None = Field(default=None, ge=0)
    refused: str | None = Field(default=None, max_length=1024)


class Best(Model):
    """The best evaluation so far and where that model is exported: `<run_uri>/best`, in the output's format."""

    step: Whole
    metric: str = Field(min_length=1, max_length=64)
    value: float
    uri: str = Field(max_length=1024)


class DataReport(Model):
    """What became of the rows: `rows` read, `used` to train, refused ones by reason, tokens in the training set."""

    rows: Whole
    used: Whole
    refused_by_reason: Refusals = Field(default_factory=dict)
    tokens: Whole
    counted_tokens: Whole = 0
    """Tokens with loss on them."""


class Resolved(Model):
    """What the plan left Auto and `prepare` settled; also the model's pinned revision and parameter counts."""

    zero_stage: int = Field(ge=0, le=3)
    warmup_steps: Whole
    total_steps: Whole = Field(ge=1)
    precision: str = Field(max_length=16)
    attention: str = Field(max_length=32)
    revision: str | None = Field(default=None, max_length=80)
    parameters: Whole = 0
    trainable_parameters: Whole = 0
    gradient_checkpointing: bool | None = None
    """None: written by a trainer that does not know it."""


class Output(Model):
    """The exported model.

    `digest` is `sha256:<hex>` over names and digests of the files, as its manifest lists them.
    """

    uri: str = Field(max_length=1024)
    digest: str = Field(max_length=80)
    format: Literal["safetensors", "peft"]
    size_bytes: Whole


class Success(Model):
    """Rank 0's last word: the authority for Succeeded. At most 3 KiB; metrics are cut first."""

    kind: Literal["success"] = "success"
    output: Output
    step: Whole
    metrics: dict[str, float] = Field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    best: Best | None = None
    """With evaluation.keepBest only; None where nothing was evaluated."""
    data_report: DataReport | None = None
    resolved: Resolved | None = None


class Failure(Model):
    """A pod's last word when it did not succeed. Replica and node are not here: the operator has them from the pod."""

    kind: Literal["failure"] = "failure"
    reason: Reason
    message: str
    rank: Rank | None = None
    step: Whole | None = None
    exit_code: int
    signal: int | None = Field(default=None, ge=0, le=128)
    log_tail: str | None = None
    time: str | None = None
    """RFC 3339, UTC, of the first sign of the failure: the first failing rank in time is the cause."""


_LAST_WORD: TypeAdapter[Success | Failure] = TypeAdapter(Annotated[Success | Failure, Field(discriminator="kind")])


def parse_termination(text: str | None) -> Success | Failure | None:
    """Reads a pod's termination message; None where it is not one of ours (another image, cut, or empty)."""
    if not text:
        return None
    try:
        return _LAST_WORD.validate_python(json.loads(text))
    except (ValueError, ValidationError, RecursionError):  # a few thousand brackets are too deep for the parser
        return None


def render_termination(record: Success | Failure) -> str:
    """JSON of at most 4 KiB in UTF-8: a Failure's log tail and message, a Success's metrics are cut until it fits."""
    if isinstance(record, Failure):
        record = record.model_copy(
            update={"log_tail": _last_bytes(record.log_tail, MAX_LOG_TAIL_BYTES), "message": record.message[:1024]}
        )
    while len(text := record.to_json()) and len(text.encode()) > MAX_TERMINATION_BYTES:
        record = _shrink(record)
    return text


def _shrink(record: Success | Failure) -> Success | Failure:
    if isinstance(record, Success):
        if not record.metrics:  # what is left are URIs in letters of several bytes
            return record.model_copy(update={"data_report": None, "resolved": None, "checkpoint": None, "best": None})
        kept = dict(list(record.metrics.items())[: len(record.metrics) // 2])
        return record.model_copy(update={"metrics": kept})
    tail = _last_bytes(record.log_tail, len((record.log_tail or "").encode()) // 2)
    if tail:
        return record.model_copy(update={"log_tail": tail})
    return record.model_copy(update={"log_tail": None, "message": record.message[: len(record.message) // 2]})


def _last_bytes(text: str | None, limit: int) -> str | None:
    if not text:
        return None
    return text.encode()[-limit:].decode(errors="ignore") if limit else None


Phase = Literal["Preparing", "Waiting", "Loading", "Training", "Evaluating", "Saving", "Exporting", "Done"]


class Warned(Model):
    """What is wrong with the training while it goes on, since which step."""

    reason: Literal["GuardWarned", "SamplerMismatch"]
    message: str = Field(min_length=1, max_length=512)
    step: Whole


class Report(Model):
    """One progress report of rank 0 (POST on our own path; at most 16 KiB, one in 5 s; a heartbeat every 30 s).

    `idle_seconds`: how long ago the loop got on for the last time, by the sender's own clock; a hang is judged on it.
    `last_advance_time` (RFC 3339, UTC) says the same for a sender that has only that. The last four fields are sent
    whenever they are known, so that a report lost is no fact lost.
    """

    phase: Phase
    step: Whole = 0
    total_steps: Whole | None = Field(default=None, ge=1)
    epoch: float | None = Field(default=None, ge=0)
    eta_seconds: Whole | None = None
    slowest_rank: Rank | None = None
    warning: Warned | None = None
    """None: nothing is wrong, any more."""
    metrics: dict[str, float] = Field(default_factory=dict, max_length=MAX_METRICS)
    idle_seconds: float | None = Field(default=None, ge=0)
    last_advance_time: str | None = Field(default=None, max_length=40)
    checkpoint: Checkpoint | None = None
    best: Best | None = None
    data_report: DataReport | None = None
    resolved: Resolved | None = None
