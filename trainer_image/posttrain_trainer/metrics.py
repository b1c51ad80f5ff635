"""What a step measured: sums and counts that are reduced once over the ranks, and the file metrics.jsonl.

Called by the loop. Names are TRL's; phase times are `time/<phase>`. The file has one line per step. On resume it is
cut back to the checkpoint's step, so no step is in it twice.
"""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Metrics = dict[str, float]


class Phases:
    """Seconds by phase since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Adds the time inside to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def seconds(self, phase: str) -> float:
        """Of one phase so far."""
        return self._seconds.get(phase, 0.0)

    def take(self) -> Metrics:
        """`time/<phase>` → seconds; starts again from zero."""
        taken = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        return taken


class Totals:
    """Sums of a step on this rank; they stay on the device until `read`, so that adding never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds each value, without gradient, in float64."""
        for name, value in values.items():
            term = value.detach().double()
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def read(self) -> tuple[tuple[str, ...], list[float]]:
        """Names in order, and their sums: one transfer from the device."""
        if not self._sums:
            return (), []
        return tuple(self._sums), [float(value) for value in torch.stack(list(self._sums.values())).tolist()]


def finite(metrics: Metrics) -> Metrics:
    """Without NaN and infinity, which no record of the contract takes."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def memory_bytes(device: torch.device) -> float:
    """Peak: of the accelerator where there is one, else of the process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


class StepLines:
    """A file of rank 0 with lines of JSON, each with its `step`, in order."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Keeps the lines up to `last_step` (0: none) and opens the file for more."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut(path, last_step)
        self._file = path.open("a")

    def add(self, step: int, line: Mapping[str, Any]) -> None:
        """One line, visible to readers at once."""
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """To the disk: before a checkpoint is committed, so that a crash leaves no hole before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the file."""
        self.sync()
        self._file.close()


class MetricsFile(StepLines):
    """metrics.jsonl: one line per step."""

    def write(self, step: int, metrics: Metrics) -> None:
        """The line of a step; JSON has no NaN: null."""
        known = finite(metrics)
        self.add(step, {name: known.get(name) for name in metrics})


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Every whole line; a line cut by a crash ends the reading."""
    lines: list[dict[str, float]] = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def _cut(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= last_step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def times_last(metrics: Metrics) -> Metrics:
    """Where a report has no room for all, the times of phases are what is left out."""
    return dict(sorted(metrics.items(), key=lambda item: item[0].startswith("time/")))
