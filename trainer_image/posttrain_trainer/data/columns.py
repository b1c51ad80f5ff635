"""The other columns of a prompt: what its rewards are given, as JSON.

Called by `build`. Every column but the prompt's own is kept under the data's name. JSON is what passes to worker
processes and servers, and to the trainer's storage, so what it cannot hold is settled here, once: dates and times
become ISO 8601 texts, decimals texts with all their digits, NaN (how tables write an empty cell) null. Anything else,
such as bytes or an infinity, is null for the rewards, unless one of them names the column: then the row is refused.
"""

from __future__ import annotations

import datetime as dt
import decimal
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain_api.online import RewardConfig
from posttrain_api.reasons import Reason
from posttrain_trainer.data.messages import RowRefused, require_unicode, shown
from posttrain_trainer.errors import TrainerFailure, printable

_log = logging.getLogger("posttrain.prepare")


@dataclass(frozen=True)
class Columns:
    """`prompt`: the data's column with the prompt, which is left out; `needed`: columns that rewards name, each with
    the field that names it."""

    prompt: str
    needed: Mapping[str, str]

    def check(self, uri: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """DatasetSchemaInvalid where none of the first rows has a column that a reward names. Warns of columns that
        rewards will find empty."""
        found = sorted({name for row in rows for name in row})
        for name, field in self.needed.items():
            if name == self.prompt or name not in found:
                has = ", ".join(column for column in found if column != self.prompt) or "none"
                raise TrainerFailure(
                    Reason.DATASET_SCHEMA_INVALID,
                    f"{uri}: {field} is {name!r}, but the columns beside the prompt's ({self.prompt}) are: {has}. "
                    "Correct it: rewards go by the data's own names.",
                )
        for name in found:
            held = next((row[name] for row in rows if name in row and not _fits(row[name])), None)
            if held is not None and name not in (self.prompt, *self.needed):
                what = f"column {printable(name)!r} has {shown(held)}, which JSON cannot hold"
                _log.warning("%s: %s: rewards find null there", uri, what)

    def record(self, values: Mapping[str, Any]) -> str:
        """One line of JSON. RowRefused where a column that a reward names is missing or cannot be given to it."""
        held = {name: self._held(name, value) for name, value in values.items() if name != self.prompt}
        for name, field in self.needed.items():
            if held.get(name) is None:
                found = ", ".join(sorted(values)) or "none"
                raise RowRefused("MissingColumn", f"no {name}, which {field} names; the row has: {found}")
        text = json.dumps(held, ensure_ascii=False)
        require_unicode(text, "a column")
        return text

    def _held(self, name: str, value: Any) -> Any:
        try:
            return _plain(value)
        except (_Unfit, RecursionError) as unfit:
            if name not in self.needed:
                return None
            raise RowRefused(
                "NotJSON", f"{name}, which {self.needed[name]} names, has {unfit}, which JSON cannot hold"
            ) from unfit


def columns_of(prompt: str, rewards: Sequence[RewardConfig]) -> Columns:
    """The columns of a source whose prompts are in `prompt`."""
    needed: dict[str, str] = {}
    for reward in rewards:
        for kind, settings in (("math", reward.math), ("exactMatch", reward.exact_match)):
            if settings is not None:
                needed.setdefault(settings.column, f"{kind}.column of reward {reward.name!r}")
    return Columns(prompt, needed)


class _Unfit(Exception):
    """A value that JSON cannot hold; says which."""


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if math.isinf(value):
                raise _Unfit(shown(value))
            return None if math.isnan(value) else value
        case dt.datetime() | dt.date() | dt.time():
            return value.isoformat()
        case decimal.Decimal():
            return str(value)
        case Mapping():
            return {str(name): _plain(each) for name, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
    raise _Unfit(shown(value))


def _fits(value: Any) -> bool:
    try:
        _plain(value)
    except (_Unfit, RecursionError):
        return False
    return True
