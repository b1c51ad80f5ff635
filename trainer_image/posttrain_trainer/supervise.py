"""One child process at a time, from start to a clean end, as process 1 of a container has to do it.

The launcher runs `prepare` and torchrun through it. SIGTERM and SIGINT are passed on and remembered; orphans are
adopted and
reaped; when the child is gone, what it left running is killed, so that no half of a group holds a device.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FrameType

from posttrain_trainer.linux import adopt_orphans, children
from posttrain_trainer.logs import LogStream

POLL_SECONDS = 0.05
TICK_SECONDS = 1.0
KILL_SECONDS = 5.0

Tick = Callable[[], bool]
"""Called about every second while the child runs; False: the child is to be killed."""


def _always() -> bool:
    return True


class Supervisor:
    """Owns the process's signals. `stopping` is True once SIGTERM or SIGINT came."""

    def __init__(self) -> None:
        self.stopping = False
        self.log = LogStream()
        self._child: int | None = None

    @property
    def child(self) -> int | None:
        """Process id of the command that runs now."""
        return self._child

    def install(self) -> None:
        """Takes over the signals and becomes the reaper of all descendants. Main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        adopt_orphans()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        if self._child is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self._child, signal.SIGTERM)

    def sleep(self, seconds: float) -> bool:
        """Waits; False as soon as we are told to stop."""
        deadline = time.monotonic() + seconds
        while not self.stopping and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))
        return not self.stopping

    def run(self, command: Sequence[str], environment: Mapping[str, str], tick: Tick = _always) -> int:
        """Runs a command to its end. Returns its exit code, negative for a signal (as subprocess does)."""
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None  # by PIPE
        self.log.follow(process.stdout)
        self._child = process.pid
        if self.stopping:  # the signal came between the check and the start
            process.send_signal(signal.SIGTERM)
        try:
            process.returncode = self._wait(process.pid, tick)  # reaped there: Popen must not look for it
        finally:  # also where `tick` raises: no child outlives this call
            self._child = None
            self._kill_rest()
            self.log.finish()
        return process.returncode

    def _wait(self, child: int, tick: Tick) -> int:
        next_tick = time.monotonic() + TICK_SECONDS
        while True:
            ended = _reap()
            if child in ended:
                return ended[child]
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + TICK_SECONDS
                if not tick():
                    os.kill(child, signal.SIGKILL)
            time.sleep(POLL_SECONDS)

    def _kill_rest(self) -> None:
        deadline = time.monotonic() + KILL_SECONDS
        while time.monotonic() < deadline:
            _reap()
            left = children()
            if not left:
                return
            for pid in left:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_SECONDS)


def _reap() -> dict[int, int]:
    """Collects every child that has ended: pid → exit code, negative for a signal."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)
