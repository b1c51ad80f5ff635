"""The values of a row: strings, numbers and lists of messages, and the refusal of those that are none.

Called by the parsers of rows. Whatever a data set holds ends here as a checked value or as a `RowRefused` that names
the field, what was found and the rule; nothing here knows stages or columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain_trainer.errors import printable

Message = dict[str, Any]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""ShareGPT's `from` and the role that it is."""


class RowRefused(Exception):
    """A row that cannot be learnt from. `reason` is what it is counted under."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = printable(detail)


def messages(value: Any, name: str) -> tuple[Message, ...]:
    """A list of {role, content}, both strings, at least one of them."""
    return tuple(_message(item, f"{name}[{index}]") for index, item in enumerate(_listed(value, name)))


def sharegpt(value: Any, name: str) -> tuple[Message, ...]:
    """A list of ShareGPT's {from, value} as messages."""
    return tuple(_turn(item, f"{name}[{index}]") for index, item in enumerate(_listed(value, name)))


def _listed(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RowRefused("WrongType", f"{name} must be a list of at least one message, it is {shown(value)}")
    return value


def _message(item: Any, name: str) -> Message:
    _require_strings(item, name, ("role", "content"))
    # Arrow fills columns that other rows have with None: a template must not see them.
    return {key: value for key, value in item.items() if value is not None}


def _turn(item: Any, name: str) -> Message:
    if isinstance(item, Mapping) and item.get("from") is None and isinstance(item.get("role"), str):
        raise RowRefused(
            "WrongType",
            f"{name} has role and content, not ShareGPT's from and value: map data.train[].columns: "
            "{messages: <column>}",
        )
    _require_strings(item, name, ("from", "value"))
    role = SHAREGPT_ROLES.get(item["from"])
    if role is None:
        raise RowRefused(
            "WrongType", f"{name}.from must be one of {', '.join(SHAREGPT_ROLES)}, it is {shown(item['from'])}"
        )
    return {"role": role, "content": item["value"]}


def _require_strings(item: Any, name: str, keys: tuple[str, str]) -> None:
    if not isinstance(item, Mapping):
        raise RowRefused("WrongType", f"{name} must be an object with {' and '.join(keys)}, it is {shown(item)}")
    for key in keys:
        if not isinstance(item.get(key), str):
            raise RowRefused("WrongType", f"{name}.{key} must be a string, it is {shown(item.get(key))}")


def string(value: Any, name: str, empty: str | None = None) -> str:
    """A string; `empty`: the reason under which one without a letter is refused, None where it may be so."""
    if not isinstance(value, str):
        raise RowRefused("WrongType", f"{name} must be a string, it is {shown(value)}")
    if empty and not value.strip():
        raise RowRefused(empty, f"{name} is empty: there is nothing to learn")
    require_unicode(value, name)
    return value


def number(value: Any, name: str) -> float:
    """A finite number that fp32 holds; strings and booleans are none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 3.4e38:
        raise RowRefused("MarginNotANumber", f"{name} must be a finite number, it is {shown(value)}: correct the row")
    return float(value)


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


def shown(value: Any) -> str:
    """Type and value, bounded."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
