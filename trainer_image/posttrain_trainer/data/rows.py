"""What a row is: text, messages, or prompt + completion; and whether the stage can learn from it.

The kind is settled once per source from its columns (`choose_kind`), then every row must have that shape
(`parse_row`). A row that has not is refused with a reason and a detail; the caller's policy decides what that means.
Columns that the kind does not need are ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure, printable

LossOn = Literal["Auto", "Completion", "Assistant", "All"]
Message = dict[str, Any]


class Kind(StrEnum):
    """Row kinds of these stages, the most telling first."""

    MESSAGES = "messages"
    PAIR = "prompt + completion"
    TEXT = "text"


COLUMNS = {Kind.MESSAGES: ("messages",), Kind.PAIR: ("prompt", "completion"), Kind.TEXT: ("text",)}

_ALIASES = {
    "prompt": ("question", "instruction", "input", "query", "problem"),
    "completion": ("answer", "output", "response", "target", "solution", "reply"),
    "text": ("content", "document", "body", "article", "raw_content"),
    "messages": ("conversation", "conversations", "dialog", "dialogue", "chat"),
}
"""Names that other data sets use: they make the advice in a message."""


class RowRefused(Exception):
    """A row that cannot be learnt from. `reason` is what it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = printable(detail)


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True)
class Pair:
    """A prompt and what should follow it, as plain strings."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Turns before the answer, and the answer; both go through the chat template. `answer` is None where all turns
    count.
    """

    prompt: tuple[Message, ...]
    answer: Message | None


Parsed = Text | Pair | Chat


def allowed_kinds(stage: str, loss_on: LossOn) -> tuple[Kind, ...]:
    """The row kinds a stage learns from. A plain text has no response, so SFT takes it only with loss on all tokens."""
    if stage == "Pretrain":
        return (Kind.TEXT,)
    if loss_on == "All":
        return (Kind.MESSAGES, Kind.PAIR, Kind.TEXT)
    return (Kind.MESSAGES, Kind.PAIR)


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
                f"{uri}: data.columns maps {ours} to {theirs!r}, but the columns are: {found}. Correct the mapping.",
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


def _advice(columns: set[str], kinds: tuple[Kind, ...]) -> str:
    for kind in kinds:
        mapping = {ours: _alias(ours, columns) for ours in COLUMNS[kind]}
        if all(mapping.values()):
            pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in mapping.items() if ours != theirs)
            return f"Set data.train[].columns: {{{pairs}}}"
    if "text" in columns and Kind.TEXT not in kinds:
        return (
            "A text has no response to learn: set data.lossOn: All to learn all of it, or give prompt and completion."
        )
    example = ", ".join(f"{ours}: <column>" for ours in COLUMNS[kinds[-1]])
    return f"Set data.train[].columns: {{{example}}}"


def _alias(ours: str, columns: set[str]) -> str | None:
    if ours in columns:
        return ours
    return next((alias for alias in _ALIASES[ours] if alias in columns), None)


def parse_row(values: Mapping[str, Any], kind: Kind, mapping: Mapping[str, str], loss_on: LossOn) -> Parsed:
    """The row in the shape of its kind. RowRefused where it is not of that shape or has nothing to learn."""
    row = {ours: _column(values, ours, mapping) for ours in COLUMNS[kind]}
    if kind is Kind.TEXT:
        return Text(_string(row["text"], "text", empty="EmptyText"))
    if kind is Kind.MESSAGES:
        return _chat(_messages(row["messages"], "messages"), loss_on)
    return _pair(row["prompt"], row["completion"], loss_on)


def _column(values: Mapping[str, Any], ours: str, mapping: Mapping[str, str]) -> Any:
    name = mapping.get(ours, ours)
    if values.get(name) is None:
        shown = ours if name == ours else f"{ours} (the data's {name!r})"
        found = ", ".join(sorted(values)) or "none"
        raise RowRefused("MissingColumn", f"no {shown}; the row has: {found}")
    return values[name]


def _pair(prompt: Any, completion: Any, loss_on: LossOn) -> Pair | Chat:
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowRefused("WrongType", "prompt and completion must both be strings or both lists of messages")
    if not isinstance(prompt, list):
        return Pair(_string(prompt, "prompt"), _string(completion, "completion", empty="EmptyCompletion"))
    answer = _messages(completion, "completion")
    if len(answer) != 1:
        raise RowRefused("WrongType", f"completion must be one assistant message, it has {len(answer)}")
    return _chat(_messages(prompt, "prompt") + answer, loss_on)


def _chat(messages: tuple[Message, ...], loss_on: LossOn) -> Chat:
    if loss_on == "All":
        return Chat(messages, None)
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowRefused("NoAssistantTurn", f"the last message must be the assistant's, its role is {last['role']!r}")
    if not last["content"].strip():
        raise RowRefused("EmptyCompletion", "the last assistant message is empty: there is nothing to learn")
    return Chat(messages[:-1], last)


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RowRefused("WrongType", f"{name} must be a list of at least one message, it is {_shown(value)}")
    return tuple(_message(item, f"{name}[{index}]") for index, item in enumerate(value))


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowRefused("WrongType", f"{name} must be an object with role and content, it is {_shown(item)}")
    for key in ("role", "content"):
        if not isinstance(item.get(key), str):
            raise RowRefused("WrongType", f"{name}.{key} must be a string, it is {_shown(item.get(key))}")
    # Arrow fills columns that other rows have with None: a template must not see them.
    return {key: value for key, value in item.items() if value is not None}


def _string(value: Any, name: str, empty: str | None = None) -> str:
    if not isinstance(value, str):
        raise RowRefused("WrongType", f"{name} must be a string, it is {_shown(value)}")
    if empty and not value.strip():
        raise RowRefused(empty, f"{name} is empty: there is nothing to learn")
    require_unicode(value, name)
    return value


def require_unicode(text: str, name: str) -> None:
    r"""RowRefused where the text has half a surrogate pair, as JSON can spell it (`\ud83d` alone): no tokenizer takes
    it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise RowRefused(
            "NotUnicode", f"{name} has half a surrogate pair, {half}, at character {error.start + 1}"
        ) from error


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
