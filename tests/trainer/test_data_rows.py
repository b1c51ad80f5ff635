"""Row kinds: which one a source has, and which rows are refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_api.reasons import Reason
from posttrain_trainer.data.messages import RowRefused
from posttrain_trainer.data.rows import Chat, Comparison, Pair, Text, parse_row
from posttrain_trainer.data.schema import COLUMNS, Kind, allowed_kinds, choose_kind
from posttrain_trainer.errors import TrainerFailure

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def test_kinds_by_stage() -> None:
    assert allowed_kinds("Pretrain", "Auto") == (Kind.TEXT,)
    assert Kind.TEXT not in allowed_kinds("SFT", "Auto")
    assert Kind.TEXT in allowed_kinds("SFT", "All")


@pytest.mark.parametrize(
    ("columns", "mapping", "kind"),
    [
        ({"prompt", "completion", "id"}, {}, Kind.PAIR),
        ({"messages", "prompt", "completion"}, {}, Kind.MESSAGES),
        ({"messages", "q", "a"}, {"prompt": "q", "completion": "a"}, Kind.PAIR),
        ({"question", "completion"}, {"prompt": "question"}, Kind.PAIR),
    ],
)
def test_choice_of_kind(columns: set[str], mapping: dict[str, str], kind: Kind) -> None:
    assert choose_kind("pvc://d/x", columns, mapping, allowed_kinds("SFT", "Auto")) is kind


@pytest.mark.parametrize(
    ("stage", "columns", "mapping", "parts"),
    [
        (
            "SFT",
            {"question", "answer"},
            {},
            ["found: answer, question", "columns: {prompt: question, completion: answer}"],
        ),
        ("SFT", {"dialogue"}, {}, ["columns: {messages: dialogue}"]),
        ("SFT", {"text"}, {}, ["lossOn: All"]),
        ("SFT", {"a"}, {"prompt": "b"}, ["maps prompt to 'b'", "the columns are: a"]),
        ("Pretrain", {"messages"}, {}, ["needs the columns (text)", "{text: <column>}"]),
        ("Pretrain", {"content"}, {}, ["columns: {text: content}"]),
    ],
)
def test_schema_messages_say_what_would_mend_it(
    stage: str, columns: set[str], mapping: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(TrainerFailure) as caught:
        choose_kind("pvc://d/x", columns, mapping, allowed_kinds(stage, "Auto"))
    assert caught.value.reason is Reason.DATASET_SCHEMA_INVALID
    for part in ["pvc://d/x", *parts]:
        assert part in caught.value.message


def test_good_rows() -> None:
    assert parse_row({"text": "a", "other": 1}, Kind.TEXT, {}, "Auto") == Text("a")
    assert parse_row({"q": "a", "completion": "b"}, Kind.PAIR, {"prompt": "q"}, "Auto") == Pair("a", "b")
    messages = [USER, ANSWER, USER, {**ANSWER, "tool_calls": None}]
    assert parse_row({"messages": messages}, Kind.MESSAGES, {}, "Auto") == Chat((USER, ANSWER, USER), ANSWER)
    assert parse_row({"messages": [USER]}, Kind.MESSAGES, {}, "All") == Chat((USER,), None)
    assert parse_row({"prompt": [USER], "completion": [ANSWER]}, Kind.PAIR, {}, "Auto") == Chat((USER,), ANSWER)


@pytest.mark.parametrize(
    ("values", "kind", "reason", "part"),
    [
        ({"prompt": "a"}, Kind.PAIR, "MissingColumn", "no completion; the row has: prompt"),
        ({"prompt": "a", "completion": None}, Kind.PAIR, "MissingColumn", "no completion"),
        ({"prompt": "a", "completion": ""}, Kind.PAIR, "EmptyCompletion", "completion is empty"),
        ({"prompt": 3, "completion": "b"}, Kind.PAIR, "WrongType", "prompt must be a string, it is int 3"),
        ({"prompt": [USER], "completion": "b"}, Kind.PAIR, "WrongType", "both be strings or both lists"),
        ({"prompt": [USER], "completion": [ANSWER, ANSWER]}, Kind.PAIR, "WrongType", "one assistant message, it has 2"),
        ({"text": " \n"}, Kind.TEXT, "EmptyText", "text is empty"),
        ({"text": "a \ud83d"}, Kind.TEXT, "NotUnicode", r"text has half a surrogate pair, '\ud83d', at character 3"),
        ({"prompt": "a", "compl\ud83d": "b"}, Kind.PAIR, "MissingColumn", r"the row has: compl\ud83d, prompt"),
        ({"messages": []}, Kind.MESSAGES, "WrongType", "at least one message"),
        ({"messages": ["hi"]}, Kind.MESSAGES, "WrongType", "messages[0] must be an object"),
        ({"messages": [{"role": "user", "content": None}]}, Kind.MESSAGES, "WrongType", "messages[0].content"),
        ({"messages": [USER]}, Kind.MESSAGES, "NoAssistantTurn", "its role is 'user'"),
        ({"messages": [USER, {**ANSWER, "content": " "}]}, Kind.MESSAGES, "EmptyCompletion", "empty"),
    ],
)
def test_bad_rows_say_why(values: dict[str, Any], kind: Kind, reason: str, part: str) -> None:
    with pytest.raises(RowRefused) as caught:
        parse_row(values, kind, {}, "Auto")
    assert caught.value.reason == reason
    assert part in caught.value.detail


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(sorted({name for names in COLUMNS.values() for name in names})), JSON),
    st.sampled_from(list(Kind)),
)
def test_any_row_is_parsed_or_refused(values: dict[str, Any], kind: Kind) -> None:
    """No row, however odd, is an unexpected error."""
    try:
        outcome: Any = parse_row(values, kind, {}, "Auto")
    except RowRefused as refusal:
        outcome = refusal
    assert isinstance(outcome, Text | Pair | Chat | Comparison | RowRefused)
