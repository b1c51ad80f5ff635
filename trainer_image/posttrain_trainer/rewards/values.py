"""What a user's function or server may answer: one number or None for each completion.

Called in the reward's process by python.py and http.py. A number that is none (NaN, infinity, text) is an error of its
row; an answer that is no list of the right length is one of the whole call, because nobody knows which row is which.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from posttrain_trainer.rewards.calls import Batch, Reply


def checked(answer: Any, batch: Batch, what: str) -> Reply:
    """The answer to a batch as plain floats. Arrays and tensors are lists too. `what`: who answered, such as `it
    returned`."""
    listed = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(listed, Sequence) or isinstance(listed, str | bytes):
        return Reply(failure=f"{what} {_shown(answer)} where a list of {len(batch)} numbers or None was expected")
    if len(listed) != len(batch):
        return Reply(failure=f"{what} {len(listed)} values for {len(batch)} completions")
    values, errors = [], {}
    for place, value in enumerate(listed):
        number, problem = _number(value)
        values.append(number)
        if problem is not None:
            errors[place] = f"{what} {problem} where a finite number or None was expected"
    return Reply(values, errors)


def _number(value: Any) -> tuple[float | None, str | None]:
    plain = _plain(value)
    if plain is None:
        return None, None
    if not isinstance(plain, int | float):
        return None, _shown(value)
    try:
        number = float(plain)
    except OverflowError:
        number = math.inf
    return (number, None) if math.isfinite(number) else (None, f"{number}")


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's."""
    try:
        return value.item()
    except (AttributeError, TypeError, ValueError, RuntimeError):  # none of theirs, or more than one number
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"a {type(value).__name__} ({text[:60]}{'…' if len(text) > 60 else ''})"
