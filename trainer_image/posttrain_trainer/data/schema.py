"""Which kind of rows a source has: settled once, from its columns, by what the stage learns from.

Called by `build` before anything is tokenised, so that a wrong column costs seconds. Every row must then have that
shape (rows.py). Columns that the kind does not need are ignored, but those of prompts are for the rewards (columns.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Literal

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure

LossOn = Literal["Auto", "Completion", "Assistant", "All"]
MARGIN = "margin"


class Kind(StrEnum):
    """Row kinds of these stages, the most telling first."""

    MESSAGES = "messages"
    PAIR = "prompt + completion"
    SHAREGPT = "conversations"
    ALPACA = "instruction + output"
    TEXT = "text"
    COMPARISON = "prompt + chosen + rejected"
    CONVERSATIONS = "chosen + rejected"
    PROMPT = "prompt"


COLUMNS = {
    Kind.MESSAGES: ("messages",),
    Kind.PAIR: ("prompt", "completion"),
    Kind.SHAREGPT: ("conversations",),
    Kind.ALPACA: ("instruction", "output"),
    Kind.TEXT: ("text",),
    Kind.COMPARISON: ("prompt", "chosen", "rejected"),
    Kind.CONVERSATIONS: ("chosen", "rejected"),
    Kind.PROMPT: ("prompt",),
}

CHATS = (Kind.MESSAGES, Kind.SHAREGPT, Kind.CONVERSATIONS)
"""Kinds whose rows always go through the chat template."""

_ALIASES = {
    "prompt": ("question", "instruction", "input", "query", "problem", "messages"),
    "completion": ("answer", "output", "response", "target", "solution", "reply"),
    "text": ("content", "document", "body", "article", "raw_content"),
    "messages": ("conversation", "dialog", "dialogue", "chat"),
    "conversations": (),
    "instruction": (),
    "output": (),
    "chosen": ("accepted", "preferred", "better", "response_chosen", "chosen_response", "win"),
    "rejected": ("dispreferred", "worse", "response_rejected", "rejected_response", "lose"),
}
"""Names that other data sets use: they make the advice in a message."""


def allowed_kinds(stage: str, loss_on: LossOn) -> tuple[Kind, ...]:
    """The row kinds a stage learns from. A plain text has no response, so SFT takes it only with loss on all tokens;
    loss on every assistant turn needs turns."""
    if stage == "Pretrain":
        return (Kind.TEXT,)
    if stage in ("RewardModel", "Preference"):
        return (Kind.COMPARISON, Kind.CONVERSATIONS)
    if stage == "RL":
        return (Kind.PROMPT,)
    if loss_on == "Assistant":
        return (Kind.MESSAGES, Kind.SHAREGPT)
    answers = (Kind.MESSAGES, Kind.PAIR, Kind.SHAREGPT, Kind.ALPACA)
    return (*answers, Kind.TEXT) if loss_on == "All" else answers


def choose_kind(uri: str, columns: Collection[str], mapping: Mapping[str, str], kinds: tuple[Kind, ...]) -> Kind:
    """The first of `kinds` whose columns are there, after the mapping {ours: theirs}.

    DatasetSchemaInvalid where a mapped column is missing or no kind fits; the message has the columns found and the
    mapping that would mend it.
    """
    found = ", ".join(sorted(columns)) or "none"
    for ours, theirs in mapping.items():
        if theirs not in columns:
            raise TrainerFailure(
                Reason.DATASET_SCHEMA_INVALID,
                f"{uri}: {_said(ours)} maps {ours} to {theirs!r}, but the columns are: {found}. Correct the mapping.",
            )
    ours_there = set(columns) | set(mapping)
    for kind in sorted(kinds, key=lambda kind: not set(COLUMNS[kind]) & set(mapping)):
        if set(COLUMNS[kind]) <= ours_there:
            return kind
    wanted = " or ".join(f"({', '.join(COLUMNS[kind])})" for kind in kinds)
    raise TrainerFailure(
        Reason.DATASET_SCHEMA_INVALID,
        f"{uri}: the stage needs the columns {wanted}, found: {found}. {_advice(set(columns), kinds)}",
    )


def _said(ours: str) -> str:
    return "rewardModel.marginColumn (or data.columns)" if ours == MARGIN else "data.columns"


def _advice(columns: set[str], kinds: tuple[Kind, ...]) -> str:
    for kind in kinds:
        mapping = {ours: _alias(ours, columns) for ours in COLUMNS[kind]}
        if all(mapping.values()):
            pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in mapping.items() if ours != theirs)
            return f"Set data.train[].columns: {{{pairs}}}"
    if "text" in columns and Kind.TEXT not in kinds and Kind.PAIR in kinds:
        return (
            "A text has no response to learn: set data.lossOn: All to learn all of it, or give prompt and completion."
        )
    example = ", ".join(f"{ours}: <column>" for ours in COLUMNS[kinds[0] if Kind.COMPARISON in kinds else kinds[-1]])
    return f"Set data.train[].columns: {{{example}}}"


def _alias(ours: str, columns: set[str]) -> str | None:
    if ours in columns:
        return ours
    return next((alias for alias in _ALIASES[ours] if alias in columns), None)
