r"""The reward `math`: the same number or formula as the gold's, by math-verify (Hugging Face), which knows LaTeX.

Runs in a process of its own (child.py). What follows the last `####` is the answer, of the data as of a completion;
a completion without one is read as math-verify does: the last \boxed{}, else the last formula or number. Gold answers
of MATH come as bare LaTeX, which math-verify would read as the first number in it: they are read as one formula.
math-verify's own time limits are off, because `by_row` has them.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

import sympy
from math_verify import parse, verify

from posttrain_trainer.rewards.rules import Score, by_row, marked

_TAIL = 4000
"""Characters at the end of a completion in which an answer without a marker is looked for."""
_NUMBER = re.compile(
    r"[$€£¥]?\s*([-+]?)\s*[$€£¥]?\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+)"
    r"(?:\.|\s*[$€£¥]|\s+(?!(?:and|or)\b)[A-Za-z]{2,}(?:[ /-][A-Za-z]+)*\.?)?"
)
"""72, -1,234.50, $18, 5 € and 72 km/h. → sign and digits. Words only, of two letters at least: `3 x + 2` is none."""
_FORMULA = re.compile(r"[\\^_=+*/()\[\]{}<>|]|\d[A-Za-z]|[A-Za-z]\d")
_GIVEN_UP = (ArithmeticError, AttributeError, LookupError, MemoryError, NotImplementedError, RecursionError, TypeError)
"""What sympy raises at what it cannot do; ValueError too."""


def same_answer(column: str) -> Score:
    """1: the same; 0: another, none that can be read, or none in time; None: the gold cannot be read."""
    # They say that no time limit is set, and what each failed attempt was.
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _value("#### $\\frac{1}{2}$", "0.5")  # the first parse builds the grammar, which is not a row's time
    return by_row(_value, column, slow=0.0)


def _value(completion: str, gold: Any) -> float | None:
    truth = _gold(str(gold))
    if not truth:
        return None
    text = _plain(completion)
    answer = marked(text)
    try:
        found = _read(_tail(text)) if answer is None else _answer(answer)
        return float(bool(found) and verify(list(truth), found, timeout_seconds=None))
    except (*_GIVEN_UP, ValueError):
        return 0.0


@lru_cache(maxsize=4096)
def _gold(text: str) -> tuple[Any, ...]:
    plain = _plain(text)
    return tuple(_answer(marked(plain) or plain.strip()))


def _answer(text: str) -> list[Any]:
    """The number or formula that the whole text is; empty: it is none."""
    number = _NUMBER.fullmatch(text)
    if number:
        return [sympy.Rational(number[1] + number[2].replace(",", ""))]
    formula = "$" not in text and "\\boxed" not in text and _FORMULA.search(text)
    return _read(f"${text}$" if formula else text)


def _read(text: str) -> list[Any]:
    found: list[Any] = parse(text, fallback_mode="no_fallback", parsing_timeout=None)
    return found


def _plain(text: str) -> str:
    r"""`\$18` is $18 to it, and only so a number."""
    return text.replace("\\$", "$")


def _tail(text: str) -> str:
    boxed = text.rfind("\\boxed")
    if boxed >= 0:
        return text[boxed : boxed + _TAIL]
    end = text[-_TAIL:]
    return end if len(end) == len(text) else end.partition("\n")[2] or end
