"""The tally of a data set: rows read, used, refused by reason; and whether the job may train on the rest.

Rows that are too long are no bad rows: they are counted apart and have a limit of their own. Nor are pairs of equal
answers, which no job is refused for as long as others are left. The first refused rows are kept with their places,
for the log, for `refused.jsonl` and for the message of a failure.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from posttrain_api.reasons import Reason
from posttrain_api.records import DataReport
from posttrain_api.trainer import DataConfig
from posttrain_trainer.data.fit import IDENTICAL, TOO_LONG, Encoded, Limits
from posttrain_trainer.data.messages import RowRefused
from posttrain_trainer.data.readers import Place
from posttrain_trainer.errors import TrainerFailure

MAX_EXAMPLES = 1000
"""Of too long rows, and as many again of bad ones and of equal answers: one sort must not crowd out the other."""
APART = (TOO_LONG, IDENTICAL)
"""Reasons that say nothing against the data."""
SHOWN = 3
ROWS_AFTER_FIRST_BAD = 10_000
"""Under policy Fail the job is lost at the first bad row: so many more are read to make the report useful."""
TRUNCATED = "Truncated"
BAD = "Bad"


@dataclass
class Tally:
    """Counts up while rows stream by. `name` is train or eval, for messages; `prompts`: no token of them is counted."""

    name: str
    prompts: bool = False
    rows: int = 0
    used: int = 0
    training_rows: int = 0
    tokens: int = 0
    counted: int = 0
    cut: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    first: list[tuple[Place, RowRefused]] = field(default_factory=list)
    first_bad_row: int | None = None

    def refuse(self, place: Place, refusal: RowRefused) -> None:
        """Counts a row that is not used."""
        self.rows += 1
        self.refused[refusal.reason] += 1
        apart = refusal.reason in APART
        if not apart and self.first_bad_row is None:
            self.first_bad_row = self.rows
        alike = self.refused[refusal.reason] if apart else self.bad
        if alike <= MAX_EXAMPLES:
            self.first.append((place, refusal))

    @property
    def bad(self) -> int:
        """Refused rows that count against the data."""
        return self.refused.total() - sum(self.refused[reason] for reason in APART)

    def use(self, encoded: Encoded) -> None:
        """Counts a row that is used."""
        self.rows += 1
        self.used += 1
        self.cut += encoded.cut
        self.training_rows += len(encoded.rows)
        for example in (example for row in encoded.rows for example in row.examples):
            self.tokens += len(example.tokens)
            self.counted += int(example.mask.sum())

    def hopeless(self, config: DataConfig) -> bool:
        """Whether reading on cannot save the job, and enough has been read for the report."""
        first = self.first_bad_row
        return config.bad_rows_policy == "Fail" and first is not None and self.rows - first >= ROWS_AFTER_FIRST_BAD

    def report(self) -> DataReport:
        """The contract's record. Truncated rows are used, and named among the reasons so that they show."""
        by_reason = dict(sorted(self.refused.items()))
        if self.cut:
            by_reason[TRUNCATED] = self.cut
        return DataReport(
            rows=self.rows,
            used=self.used,
            refused_by_reason=by_reason,
            tokens=self.tokens,
            counted_tokens=self.counted,
        )

    def summary(self) -> str:
        """One line for the log."""
        shares = (f"{reason} {count} ({count / self.rows:.2%})" for reason, count in sorted(self.refused.items()))
        reasons = ", ".join(shares) or "none"
        cut = f", {self.cut} truncated" if self.cut else ""
        return (
            f"{self.name}: {self.rows} rows, {self.used} used as {self.training_rows} training rows{cut}, "
            f"{self.tokens} tokens, {self.counted} counted; refused: {reasons}"
        )

    def write_refused(self, path: Path) -> None:
        """The first refused rows, one JSON object per line."""
        lines = [
            json.dumps({"place": str(place), "reason": refusal.reason, "detail": refusal.detail}, ensure_ascii=False)
            for place, refusal in self.first
        ]
        path.write_text("".join(line + "\n" for line in lines))


def judge(tally: Tally, config: DataConfig, limits: Limits) -> None:
    """TrainerFailure where the job must not train on what is left. Sources of the limits: data.badRows,
    data.tooLong*.
    """
    too_long = tally.refused[TOO_LONG]
    _judge_bad(tally, config, tally.bad)
    if tally.used == 0 or (tally.counted == 0 and not tally.prompts):
        raise TrainerFailure(Reason.NOTHING_TO_LEARN, _nothing(tally, limits, too_long))
    if config.too_long == "Fail" and too_long:
        raise TrainerFailure(
            Reason.DATA_ROWS_REJECTED,
            f"{_places(tally, TOO_LONG)} {too_long} of {tally.rows} {tally.name} rows are too long, and "
            "data.tooLong "
            f"is Fail. {limits.advice}, shorten them, or set data.tooLong: Skip.",
        )
    share = (too_long + tally.cut) / tally.rows
    if share > config.too_long_max_fraction:
        raise TrainerFailure(
            Reason.DATA_ROWS_REJECTED,
            f"{too_long + tally.cut} of {tally.rows} {tally.name} rows ({share:.1%}) are longer than "
            f"{limits.max_length} "
            f"tokens; data.tooLongMaxFraction allows {config.too_long_max_fraction:.1%}. "
            f"{_places(tally, TOO_LONG)} "
            f"{limits.advice} or data.tooLongMaxFraction.",
        )


def _judge_bad(tally: Tally, config: DataConfig, bad: int) -> None:
    if not bad:
        return
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(tally.refused.items()) if reason not in APART)
    found = f"{_places(tally, BAD)} {bad} of {tally.rows} {tally.name} rows read are refused ({counts})."
    if config.bad_rows_policy == "Fail":
        raise TrainerFailure(
            Reason.DATA_ROWS_REJECTED,
            f"{found} Mend or remove them, or set data.badRows: {{policy: Skip}} to leave out up to maxFraction of "
            "all rows.",
        )
    if bad / tally.rows > config.bad_rows_max_fraction:
        raise TrainerFailure(
            Reason.DATA_ROWS_REJECTED,
            f"{found} data.badRows.maxFraction allows {config.bad_rows_max_fraction:.2%}. Mend them or raise it.",
        )


def _nothing(tally: Tally, limits: Limits, too_long: int) -> str:
    if tally.rows == 0:
        return f"The {tally.name} data have no rows. Check data.{tally.name}[].uri."
    if too_long:
        return (
            f"{too_long} of {tally.rows} {tally.name} rows are too long and none is left (limit {limits.max_length} "
            "tokens). "
            f"{_places(tally, TOO_LONG)} {limits.advice}."
        )
    if tally.refused[IDENTICAL] == tally.rows:
        return (
            f"The two answers of all {tally.rows} {tally.name} rows are equal: there is nothing to prefer. "
            f"{_places(tally, IDENTICAL)} Check that chosen and rejected are different columns of the data."
        )
    return (
        f"No token of the {tally.rows} {tally.name} rows has loss on it: the mask leaves nothing to learn. "
        "Check data.lossOn and that responses are not empty."
    )


def _sort(refusal: RowRefused) -> str:
    return refusal.reason if refusal.reason in APART else BAD


def _places(tally: Tally, sort: str) -> str:
    chosen = [(place, refusal) for place, refusal in tally.first if _sort(refusal) == sort]
    shown = " ".join(f"{place}: {refusal.detail}." for place, refusal in chosen[:SHOWN])
    return shown + (" …" if len(chosen) > SHOWN else "")
