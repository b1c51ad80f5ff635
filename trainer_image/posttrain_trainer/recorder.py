"""Everything the outside sees of a running job: metrics.jsonl, progress reports, Prometheus, the terminal or the log.

Called by the loop on every rank; only rank 0 has sinks. It measures nothing and decides nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from posttrain_api.records import MAX_METRICS, Best, Checkpoint, DataReport, Phase, Report, Resolved, Warned
from posttrain_trainer.metrics import Metrics, MetricsFile, StepLines, finite

_SMOOTH = 0.9
log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes a report whenever there is something new."""

    def report(self, report: Report) -> None: ...


class Observer(Protocol):
    """Takes the metrics of each step."""

    def observe(self, metrics: Metrics, step: int) -> None: ...


class Recorder:
    """Sinks of rank 0; without sinks (other ranks) it does nothing."""

    def __init__(self, total_steps: int, sinks: Sequence[Sink] = (), observers: Sequence[Observer] = ()) -> None:
        self.slowest_rank = 0
        self._file: MetricsFile | None = None
        self._completions: StepLines | None = None
        self._total_steps = total_steps
        self._sinks = sinks
        self._observers = observers
        self._report = Report(phase="Loading", total_steps=total_steps)
        self._last_step: float | None = None
        self._step_seconds = 0.0

    def open(self, file: MetricsFile, completions: StepLines | None = None) -> None:
        """Where the lines go; given once the step to resume from is known."""
        self._file, self._completions = file, completions

    def facts(self, data_report: DataReport, resolved: Resolved) -> None:
        """What every later report repeats."""
        self._send(data_report=data_report, resolved=resolved)

    def phase(self, phase: Phase) -> None:
        """The job does something else now."""
        self._send(phase=phase)

    def checkpoint(self, saved: Checkpoint, best: Best | None) -> None:
        """A checkpoint was committed, and so was the best evaluation so far."""
        self._send(checkpoint=saved, best=best)

    @property
    def warning(self) -> Warned | None:
        """What is wrong while training goes on; said with every step."""
        return self._report.warning

    @warning.setter
    def warning(self, found: Warned | None) -> None:
        if found is not None and found != self._report.warning:
            log.warning("%s: %s", found.reason, found.message)
        if found is None and self._report.warning is not None:
            log.info("over: %s", self._report.warning.message)
        self._report = self._report.model_copy(update={"warning": found})

    def step(self, step: int, metrics: Metrics) -> None:
        """A step is done: its line, its numbers, and the time it was."""
        if self._file is not None:
            self._file.write(step, metrics)
        for observer in self._observers:
            observer.observe(metrics, step)
        self._send(
            phase="Training",
            step=step,
            epoch=metrics.get("epoch"),
            eta_seconds=self._eta(step),
            slowest_rank=self.slowest_rank,
            metrics=dict(list(finite(metrics).items())[:MAX_METRICS]),
        )

    def completions(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Samples of a rollout, before the step's updates."""
        if self._completions is not None:
            for line in lines:
                self._completions.add(step, line)

    def sync(self) -> None:
        """What was written is on the disk."""
        for file in self._files():
            file.sync()

    def close(self) -> None:
        """After the last step."""
        for file in self._files():
            file.close()
        self._file = self._completions = None

    def _files(self) -> list[StepLines]:
        return [file for file in (self._file, self._completions) if file is not None]

    def _eta(self, step: int) -> int | None:
        """Seconds to the end, from a smoothed time between steps: evaluations and saves are in it."""
        now, before = time.monotonic(), self._last_step
        self._last_step = now
        if before is None:
            return None
        seconds = now - before
        self._step_seconds = (
            seconds if not self._step_seconds else _SMOOTH * self._step_seconds + (1 - _SMOOTH) * seconds
        )
        return int(self._step_seconds * (self._total_steps - step))

    def _send(self, **changes: object) -> None:
        if not self._sinks:
            return
        self._report = self._report.model_copy(update=changes)
        for sink in self._sinks:
            sink.report(self._report)
