"""Progress for people: a bar on a terminal, a line now and then in a log.

A sink of the recorder on rank 0.
"""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm  # type: ignore[import-untyped]

from posttrain_api.records import Report

LOG_SECONDS = 10.0
_SHOWN = {
    "reward": "reward",
    "loss": "loss",
    "kl": "kl",
    "objective/kl": "kl",
    "completions/mean_length": "length",
    "eval_reward": "eval reward",
    "eval_loss": "eval",
    "mean_token_accuracy": "acc",
    "learning_rate": "lr",
    "tokens_per_second": "tok/s",
}
log = logging.getLogger(__name__)


class Console:
    """Shows each report: everything on a terminal, else at most one line in `LOG_SECONDS`, and the last."""

    def __init__(self, total_steps: int) -> None:
        self._bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self._logged_at = -LOG_SECONDS
        self._step = -1

    def report(self, report: Report) -> None:
        """Takes reports in order; one without a new step shows nothing."""
        if report.step == self._step or not report.metrics:
            return
        self._step = report.step
        if self._bar is not None:
            self._bar.n = report.step
            self._bar.set_postfix_str(_numbers(report), refresh=True)
        elif time.monotonic() - self._logged_at >= LOG_SECONDS or report.step == report.total_steps:
            self._logged_at = time.monotonic()
            log.info("step %d/%s  %s%s", report.step, report.total_steps, _numbers(report), _eta(report))

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _numbers(report: Report) -> str:
    shown = [(label, report.metrics[name]) for name, label in _SHOWN.items() if name in report.metrics]
    return "  ".join(f"{label} {value:.4g}" if value < 1e4 else f"{label} {value:,.0f}" for label, value in shown)


def _eta(report: Report) -> str:
    return "" if not report.eta_seconds else f"  eta {report.eta_seconds // 60}:{report.eta_seconds % 60:02d}"
