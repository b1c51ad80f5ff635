"""Rules: which answers are the same, and that no completion can hold the process for long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from reward_kit import completion, reward, scored

from posttrain_trainer.rewards import rules
from posttrain_trainer.rewards.calls import Batch, Reply
from posttrain_trainer.rewards.child import KINDS
from posttrain_trainer.rewards.reward_set import batch_of
from posttrain_trainer.rewards.rules import Unloadable
from posttrain_trainer.rewards.workers import SLACK_SECONDS

SAME = [
    ("Natalia sold 48 + 24 = 72.\n#### 72", "so she sold 72 clips\n#### 72"),
    ("#### 72", "The answer is 72."),
    ("#### 72", "first 3, then \\boxed{72}, not 5"),
    ("72", "#### 72\n\nQuestion: another one? 5"),
    ("72", "#### 1\nno: #### 72"),
    (72, "#### 72.0"),
    ("1,234.50", "#### 1234.5"),
    ("1234", "it is 1,234"),
    ("18", "#### $18"),
    ("18", "#### $18.00"),
    ("18", "it costs \\$18"),
    ("$18", "#### 18 dollars per day."),
    ("5", "#### 5 €"),
    ("-3", "#### -3"),
    ("0.5", "#### \\frac{1}{2}"),
    ("\\frac{1}{2}", "#### 0.5"),
    ("50%", "#### 50%"),
    ("3\\sqrt{13}", "\\boxed{3\\sqrt{13}}"),
    ("3x+2", "#### 2+3x"),
    ("3 x + 2", "\\boxed{3x+2}"),
    ("72", "#### 72 km/h."),
    ("72", "#### 72 students in total"),
    ("(1,2)", "\\boxed{(1, 2)}"),
    ("72", "2 " * 5000 + "\nso 72"),
    ("7", "\\boxed{7}, " + "and 3 is odd, " * 500),
]
OTHER = [
    ("72", "#### 73"),
    ("72", "72 and then #### 73"),
    ("72", "no idea"),
    ("72", ""),
    ("72", "####"),
    ("3\\sqrt{13}", "\\boxed{3}"),
    ("1234", "#### 1,23,4 5"),
    ("3 x + 2", "#### 3"),
    ("3 x + 2", "#### 3 x + 5"),
    ("72", "\\boxed{"),
]
UNREAD = ["blue sky", "", "  ", "####", None]


def batch(rows: Sequence[tuple[Any, str]]) -> Batch:
    return batch_of([completion(text, number=n, answer=gold) for n, (gold, text) in enumerate(rows)])


def score(kind: str, rows: Sequence[tuple[Any, str]], seconds: float = 240.0, **arguments: Any) -> Reply:
    return KINDS[kind](**arguments)(batch(rows), seconds)


def test_math_answers_that_are_the_same() -> None:
    reply = score("math", SAME, column="answer")
    assert [row for row, value in zip(SAME, reply.values, strict=True) if value != 1.0] == []
    assert (reply.errors, reply.notes) == ({}, [])


def test_math_answers_that_are_not() -> None:
    reply = score("math", OTHER, column="answer")
    assert [row for row, value in zip(OTHER, reply.values, strict=True) if value != 0.0] == []
    assert reply.errors == {}


def test_math_gold_that_cannot_be_read_is_none_and_counted() -> None:
    reply = score("math", [("7", "7"), *((gold, "7") for gold in UNREAD)], column="answer")
    assert reply.values == [1.0, *[None] * len(UNREAD)]
    assert reply.errors == {}
    (note,) = reply.notes
    assert f"{len(UNREAD)} of {len(UNREAD) + 1}" in note
    assert "'answer'" in note
    assert "'blue sky' in row 1" in note


def test_math_that_runs_for_ever_is_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "ROW_SECONDS", 0.3)
    endless = "$9^{9^{9^{9^{9}}}}$"
    reply = score("math", [("5", endless), ("5", "\\boxed{" + "(" * 3000 + "}"), ("5", "#### 5")], column="answer")
    assert reply.values == [0.0, 0.0, 1.0]
    assert reply.errors == {}


def test_a_column_that_no_row_has_skips() -> None:
    for kind in ("math", "exact_match"):
        reply = score(kind, [("5", "5")], column="solution")
        assert reply.values == [None]
        assert "'solution'" in reply.notes[0]


def test_exact_match() -> None:
    rows = [
        ("yes", " yes\n", 1.0),
        ("yes", "I think so.\nyes", 1.0),
        ("#### yes", "because\n#### yes \n\nmore", 1.0),
        ("New  York", "New York", 1.0),
        ("a\nb", "a\nb", 1.0),
        (3, "3", 1.0),
        ("yes", "yes\n#### no", 0.0),
        ("yes", "Yes", 0.0),
        ("yes", "", 0.0),
        ("72", "72.0", 0.0),
        (" ", "", None),
        (None, "None", None),
    ]
    reply = score("exact_match", [(gold, text) for gold, text, _ in rows], column="answer")
    assert reply.values == [value for *_, value in rows]


def test_patterns() -> None:
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    right = "<think>a\nb</think>\n<answer>1</answer>"
    rows = [("", right), ("", f"x {right}"), ("", f"{right} y"), ("", "")]
    assert score("format", rows, pattern=pattern).values == [1.0, 0.0, 0.0, 0.0]
    assert score("regex", rows, pattern=pattern).values == [1.0, 1.0, 1.0, 0.0]
    assert score("regex", [("", "a\nb")], pattern="a.b").values == [1.0]


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(Unloadable, match=r"'\(a'.*missing \)"):
        KINDS["format"](pattern="(a")


def test_a_catastrophic_pattern_costs_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "ROW_SECONDS", 0.2)
    reply = score("regex", [("", "aab"), ("", "a" * 60), ("", "b")], pattern="^(a+)+b$")
    assert reply.values == [1.0, None, 0.0]
    assert reply.errors == {1: "60 characters were not scored in 0.2 s of computing"}


def test_many_slow_rows_end_before_the_call_does() -> None:
    begun = time.monotonic()
    reply = score("regex", [("", "aab"), *[("", "a" * 60)] * 30], seconds=3.0, pattern="^(a+)+b$")
    assert time.monotonic() - begun < 3.0 + SLACK_SECONDS
    assert reply.values == [1.0, *[None] * 30]
    assert sorted(reply.errors) == list(range(1, 31))


def test_a_row_that_only_waits_ends_with_the_call() -> None:
    """As on a machine so busy that a row hardly computes."""

    def waits(text: str, gold: Any) -> float:
        time.sleep(20)
        return 1.0

    begun = time.monotonic()
    reply = rules.by_row(waits)(batch([("", "a"), ("", "b")]), 1.0)
    assert time.monotonic() - begun < 10
    assert sorted(reply.errors) == [0, 1]


def test_a_row_without_time_left_is_no_wrong_answer() -> None:
    reply = score("math", [("5", "$9^{9^{9^{9^{9}}}}$")] * 8, seconds=1.0, column="answer")
    assert reply.errors
    assert all(reply.values[place] is None for place in reply.errors)
    assert {reply.values[place] for place in range(8) if place not in reply.errors} <= {0.0}
    assert reply.notes == []


@pytest.mark.parametrize(
    ("bounds", "values"),
    [
        ({"min_tokens": 2}, [0, 1, 1]),
        ({"max_tokens": 2}, [1, 1, 0]),
        ({"min_tokens": 2, "max_tokens": 2}, [0, 1, 0]),
        ({}, [1, 1, 1]),
    ],
)
def test_length(bounds: dict[str, int], values: list[float]) -> None:
    completions = [completion("some text", range(n)) for n in (1, 2, 3)]
    assert scored(reward(name="length", length=bounds), completions).values[:, 0].tolist() == values
