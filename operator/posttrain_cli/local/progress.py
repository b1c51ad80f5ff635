"""The progress of a local run, from the metrics.jsonl that rank 0 writes.

A bar on a terminal, a line now and then elsewhere. Reads only; a file that is not there yet, or a last line that is
half written, is normal.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

WIDTH = 30
FIGURES = ("loss", "eval_loss", "reward", "eval_reward")
QUIET_SECONDS = 10.0


class MetricsTail:
    """Follows a metrics.jsonl. `last` is the newest complete record that has a step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.last: dict[str, Any] = {}

    def read(self) -> bool:
        """Takes in what was appended; whether anything was."""
        if not self._path.exists():
            return False
        if self._path.stat().st_size < self._offset:  # cut back to a checkpoint
            self._offset = 0
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            record = json.loads(line)
            if "step" in record:
                self.last = {**self.last, **record}
        return bool(whole)


@dataclass
class Bar:
    """Draws one job's progress on `out`. `total` is the number of steps, None until it is known."""

    name: str
    out: IO[str]
    total: int | None = None
    _shown: float = 0.0
    _drawn: bool = False

    def show(self, record: dict[str, Any], now: float | None = None) -> None:
        """Redraws the bar; where `out` is no terminal, writes a line, at most one in ten seconds."""
        now = time.monotonic() if now is None else now
        if self.out.isatty():
            self.out.write(f"\r\033[K{self.text(record)}")
            self._drawn = True
        elif now - self._shown >= QUIET_SECONDS:
            self.out.write(self.text(record) + "\n")
            self._shown = now
        self.out.flush()

    def text(self, record: dict[str, Any]) -> str:
        """`name [####......] 40/100 loss=0.41 eval_loss=0.5`."""
        step = int(record.get("step", 0))
        figures = " ".join(f"{key}={record[key]:.4g}" for key in FIGURES if key in record)
        if not self.total:
            return f"{self.name} step {step} {figures}".rstrip()
        filled = min(WIDTH, WIDTH * step // self.total)
        return f"{self.name} [{'#' * filled}{'.' * (WIDTH - filled)}] {step}/{self.total} {figures}".rstrip()

    def close(self, record: dict[str, Any]) -> None:
        """Leaves the last state on a line of its own."""
        if self._drawn:
            self.out.write(f"\r\033[K{self.text(record)}\n")
        elif record:
            self.out.write(self.text(record) + "\n")
        self.out.flush()
