"""Runs one planned job in local processes and says how it ended.

Called by `posttrain run` for each job of a file. SIGINT and SIGTERM stop the job with its grace period: the trainer
saves, and the next call goes on from there.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, Any

from posttrain_api import names
from posttrain_api.records import parse_termination
from posttrain_cli.local import processes
from posttrain_cli.local.outcome import PodEnd, Span, status_of
from posttrain_cli.local.processes import Pod
from posttrain_cli.local.progress import Bar, MetricsTail
from posttrain_operator.plan.types import Plan

LOOK_SECONDS = 0.2
PEERS_SECONDS = 30.0
"""What the other launchers have to notice that one has failed, and to say their last word."""
TAIL_LINES = 40


class StopFlag:
    """Set by SIGINT or SIGTERM."""

    def __init__(self) -> None:
        self.is_set = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. A second signal does not wait for the last save."""
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """SIGINT and SIGTERM set the flag inside the block; the old handlers come back afterwards."""
    flag = StopFlag()
    old = {number: signal.signal(number, flag.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run_plan(plan: Plan, folder: Path, out: IO[str]) -> dict[str, Any]:
    """Runs to the end; the status as the cluster would show it. Logs and last words stay in `folder`."""
    start = datetime.now(UTC)
    with stop_on_signals() as flag:
        pods = processes.start(plan, folder)
        try:
            _follow(plan, pods, flag, out)
        finally:
            processes.stop(pods, plan.grace_seconds)
    return status_of(plan, [_end_of(pod) for pod in pods], Span(start, datetime.now(UTC)), flag.is_set)


def _follow(plan: Plan, pods: Sequence[Pod], flag: StopFlag, out: IO[str]) -> None:
    tail = MetricsTail(Path(plan.config.run_dir) / names.METRICS_FILE)
    bar = Bar(plan.config.job.name, out, plan.config.training.max_steps)
    give_up: float | None = None
    while processes.running(pods):
        if flag.is_set:
            out.write("\nstopping: the trainer saves its state\n")
            break
        if processes.failed(pods):
            give_up = give_up or time.monotonic() + PEERS_SECONDS
            if time.monotonic() > give_up:
                break
        if tail.read():
            bar.show(tail.last)
        time.sleep(LOOK_SECONDS)
    tail.read()
    bar.close(tail.last)


def _end_of(pod: Pod) -> PodEnd:
    word = pod.last_word.read_text() if pod.last_word.exists() else None
    return PodEnd(pod.name, pod.process.returncode, parse_termination(word), log_tail(pod.log))


def log_tail(log: Path) -> str:
    """The end of a launcher's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
