"""What a rule is, and the small questions its Python half asks of raw data.

A rule is said twice, in CEL for the API server and in Python for everyone else, and once in words. Both halves see
the object as the
user wrote it (plain maps and lists). Python predicates are total: data of a wrong type is the schema's business, so a
question
about it answers None and the rule holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One cross-field rule.

    `at`: nodes that carry it, as paths from the object's root ("" is the root, `spec.data.train[]` each item);
    `field`: the field
    blamed, relative to the node; `must` and `instead`: the message's two halves; `holds`: the Python twin, None for
    transition
    rules, which only the API server can check because only it knows the old object.
    """

    at: tuple[str, ...]
    cel: str
    must: str
    instead: str
    field: str = ""
    holds: Callable[[Any], bool] | None = None
    message_expression: str | None = None
    forbidden: bool = False
    """The field may not be there or may not change (FieldValueForbidden), rather than having a wrong value."""

    @property
    def message(self) -> str:
        """As the API server says it."""
        return f"{self.must}; {self.instead}"


def get(node: Any, path: str) -> Any:
    """The value at a dotted path, None where anything on the way is missing or no map."""
    for key in path.split("."):
        if not isinstance(node, Mapping):
            return None
        node = node.get(key)
    return node


def has(node: Any, path: str) -> bool:
    """Whether something stands at the path (null counts as nothing, as for the API server)."""
    return get(node, path) is not None


def count(node: Any, *paths: str) -> int:
    """How many of the paths are there."""
    return sum(has(node, path) for path in paths)


def whole(node: Any, path: str, default: int) -> int | None:
    """The whole number at the path, `default` where there is none, None where something else stands there."""
    value = get(node, path)
    if value is None:
        return default
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def positive(node: Any, path: str, default: bool) -> bool:
    """Whether the number at the path is more than 0; `default` where there is none, True where no number stands
    there."""
    value = get(node, path)
    if value is None:
        return default
    return not isinstance(value, (int, float)) or isinstance(value, bool) or value > 0


def matches(value: Any, pattern: str) -> bool:
    """Whether the text is wholly of this form; what is no text passes (the schema refuses it)."""
    return not isinstance(value, str) or re.fullmatch(pattern, value) is not None


def cel_matches(subject: str, pattern: str) -> str:
    """The same question in CEL: RE2, anchored, as a raw string."""
    return f"{subject}.matches(r'^(?:{pattern})$')"


def nodes(root: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every (path, value) that a rule's `at` names in this object; `x[]` stands for each item of the list x."""
    found: list[tuple[str, Any]] = [("", root)]
    for part in path.split(".") if path else ():
        key, is_list = part.removesuffix("[]"), part.endswith("[]")
        step = [(f"{at}.{key}".lstrip("."), get(value, key)) for at, value in found]
        found = [item for at, value in step for item in (_items(at, value) if is_list else [(at, value)])]
    yield from ((at, value) for at, value in found if value is not None)


def _items(at: str, value: Any) -> list[tuple[str, Any]]:
    return [(f"{at}[{index}]", item) for index, item in enumerate(value)] if isinstance(value, list) else []


def cel_has(path: str) -> str:
    """CEL: something stands at the dotted path below self, and at every step before it."""
    parts = path.split(".")
    return " && ".join(f"has(self.{'.'.join(parts[: depth + 1])})" for depth in range(len(parts)))


def one_of(at: str, names: tuple[str, ...], instead: str) -> Rule:
    """The rule that exactly one of these fields of a node is there."""
    terms = " + ".join(f"(has(self.{name}) ? 1 : 0)" for name in names)
    return Rule(
        at=(at,),
        cel=f"{terms} == 1",
        must=f"needs exactly one of {', '.join(names)}",
        instead=instead,
        holds=lambda node: count(node, *names) == 1,
    )


def excludes(at: str, field: str, cel_there: str, there: Callable[[Any], bool], words: tuple[str, str]) -> Rule:
    """The rule that something is not there: `cel_there` and `there` say when it is, `words` are must and instead."""
    return Rule(
        at=(at,),
        cel=f"!({cel_there})",
        must=words[0],
        instead=words[1],
        field=field,
        forbidden=True,
        holds=lambda node: not there(node),
    )


def needs(at: str, field: str, cel: str, holds: Callable[[Any], bool], words: tuple[str, str]) -> Rule:
    """The rule that a field, where it says this, needs something else: `words` are must and instead."""
    return Rule(at=(at,), cel=cel, must=words[0], instead=words[1], field=field, holds=holds)
