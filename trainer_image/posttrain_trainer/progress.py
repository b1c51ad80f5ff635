"""Progress of a long step: a bar on a terminal, a log line every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm  # type: ignore[import-untyped]

from posttrain_trainer.signs import mark

EVERY_SECONDS = 5.0

_log = logging.getLogger("posttrain.prepare")


class Progress:
    """Counts up to `total` (bytes, mostly). Used as a context."""

    def __init__(self, name: str, total: int) -> None:
        self._name = name
        self._total = max(1, total)
        self._done = 0
        self._shown = time.monotonic()
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._bar = tqdm(total=self._total, desc=self._name, unit="B", unit_scale=True)
        return self

    def advance(self, amount: int, note: str) -> None:
        """`amount` more is done; `note` says what that means so far."""
        mark()
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
            self._bar.set_postfix_str(note, refresh=False)
        elif time.monotonic() - self._shown >= EVERY_SECONDS:
            self._shown = time.monotonic()
            _log.info("%s: %.0f %%, %s", self._name, min(100.0, 100 * self._done / self._total), note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
