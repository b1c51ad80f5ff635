"""Rewards that are rules: exactMatch, format, regex, and what math (mathematics.py) shares with them.

Run in a process of their own (child.py), row by row. Where an answer is, in the data as in a completion: after the last
`####` to the end of that line, as GSM8K writes it; `exactMatch` else takes the whole text or its last line. A row has
its own time limit: completions are drawn by a policy that learns, and one of them will drive a pattern or a computer
algebra system to run for ever.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from posttrain_trainer.rewards.calls import Batch, Reply

ROW_SECONDS = 5.0
"""Of one row, and never more than a quarter of the call's seconds: one bad row must not take the others' time."""
MARKER = "####"
Score = Callable[[Batch, float], Reply]
"""A batch and the seconds that scoring it may take → the reply."""
Row = Callable[[str, Any], float | None]
"""A completion and its gold answer (None where the rule has none) → its value; None: the gold says nothing."""


class Unloadable(Exception):
    """This reward can never score; the text says why and what to do."""


class _Slow(BaseException):
    """Past every `except Exception` of the libraries between the alarm and us."""


def exact_match(column: str) -> Score:
    """1: the completion's answer is the gold's, letter by letter but for white space; None: the gold is empty."""

    def value(completion: str, gold: Any) -> float | None:
        truth = _squeezed(marked(str(gold)) or str(gold))
        if not truth:
            return None
        answer = marked(completion)
        lines = completion.strip().splitlines() or [""]
        candidates = [completion, lines[-1]] if answer is None else [answer]
        return float(truth in map(_squeezed, candidates))

    return by_row(value, column)


def matches(pattern: str, *, whole: bool) -> Score:
    """1: the whole completion matches, or the pattern is found in it. `.` is a line break too."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        raise Unloadable(f"the pattern {pattern!r} is no regular expression of Python: {error}. Correct it") from error
    look = compiled.fullmatch if whole else compiled.search
    return by_row(lambda completion, gold: float(look(completion) is not None))


def marked(text: str) -> str | None:
    """What follows the last `####`, to the end of its line; None: there is none."""
    _, marker, after = text.rpartition(MARKER)
    return after.strip().split("\n")[0].strip() if marker else None


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def by_row(value: Row, column: str | None = None, slow: float | None = None) -> Score:
    """Scores row after row. `slow`: the value of a row that takes too long; None: that is an error of this row."""

    def score(batch: Batch, seconds: float) -> Reply:
        golds = batch.columns.get(column, [None] * len(batch)) if column is not None else [""] * len(batch)
        values: list[float | None] = []
        errors = {}
        longest = min(ROW_SECONDS, seconds / 4)
        ends = time.monotonic() + 0.9 * seconds  # a little before the process is killed without a word
        for place, (completion, gold) in enumerate(zip(batch.completions, golds, strict=True)):
            limit = min(longest, ends - time.monotonic())
            try:
                values.append(None if gold is None else _within(limit, value, completion, gold))
            except _Slow:
                values.append(slow)
                if slow is None or limit < longest:
                    errors[place] = f"{len(completion)} characters were not scored in {max(limit, 0):.2g} s"
        return Reply(values, errors, notes=_unread(column, batch, values))

    return score


def _unread(column: str | None, batch: Batch, values: Sequence[float | None]) -> list[str]:
    places = [place for place, value in enumerate(values) if value is None]
    if not places or column is None:
        return []
    example = batch.columns.get(column, [None] * len(batch))[places[0]]
    found = f"{len(places)} of {len(batch)} completions are skipped: the column {column!r} holds no answer that can be "
    return [f"{found}read, for example {str(example)[:80]!r} in row {batch.rows[places[0]]}"]


def _within(seconds: float, value: Row, completion: str, gold: Any) -> float | None:
    """Main thread only. Python's engine of regular expressions, and its integers, look for signals while they work."""
    if seconds <= 0:
        raise _Slow
    before = signal.signal(signal.SIGALRM, _alarm)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return value(completion, gold)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _alarm(number: int, frame: FrameType | None) -> None:
    raise _Slow
