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
"""Of computing for one row, and never more than a quarter of the call's seconds: one bad row must not take the others'
time. Not of the clock: a busy machine must not change a reward."""
MARKER = "####"
Score = Callable[[Batch, float], Reply]
"""A batch and the seconds that scoring it may take → the reply."""
Row = Callable[[str, Any], float | None]
"""A completion and its gold answer (None where the rule has none) → its value; None: the gold says nothing."""


class Unloadable(Exception):
    """This reward can never score; the text says why and what to do."""


class _Slow(BaseException):
    """The row took too long. Past every `except Exception` of the libraries between the alarm and us."""


class _Late(BaseException):
    """The call's time is over."""


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
            try:
                values.append(None if gold is None else _within((longest, ends), value, completion, gold))
            except _Slow:
                values.append(slow)
                if slow is None:
                    errors[place] = f"{len(completion)} characters were not scored in {longest:.2g} s of computing"
            except _Late:
                values.append(None)
                errors[place] = f"timeoutSeconds, {seconds:g} s, were over before it was scored. Raise it"
        unread = [place for place, each in enumerate(values) if each is None and place not in errors]
        return Reply(values, errors, notes=_unread(column, batch, unread))

    return score


def _unread(column: str | None, batch: Batch, places: Sequence[int]) -> list[str]:
    if not places or column is None:
        return []
    example = batch.columns.get(column, [None] * len(batch))[places[0]]
    found = f"{len(places)} of {len(batch)} completions are skipped: the column {column!r} holds no answer that can be "
    return [f"{found}read, for example {str(example)[:80]!r} in row {batch.rows[places[0]]}"]


def _within(limits: tuple[float, float], value: Row, completion: str, gold: Any) -> float | None:
    """The value, within so many seconds of computing and until that time. Main thread only: Python's engine of regular
    expressions, and its integers, look for signals while they work."""
    longest, ends = limits
    left = ends - time.monotonic()
    if left <= 0:
        raise _Late
    try:
        signal.signal(signal.SIGVTALRM, _slow)
        signal.signal(signal.SIGALRM, _late)
        signal.setitimer(signal.ITIMER_VIRTUAL, longest)
        signal.setitimer(signal.ITIMER_REAL, left)
        return value(completion, gold)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _slow(number: int, frame: FrameType | None) -> None:
    raise _Slow


def _late(number: int, frame: FrameType | None) -> None:
    raise _Late
