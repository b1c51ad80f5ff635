"""The rank's side of the processes that score: started once, called again and again, killed and replaced at a deadline.

Used by reward_set.py, from one thread, the rank's main thread: the kernel ends these processes with the thread that
started them. Nothing here waits for a process without a limit, so a reward that hangs costs its deadline and is
reported by its name. Each process has its own session: what a user's function starts is killed with it.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_trainer.rewards.calls import Call, Line, Ready, Reply, Task, Unusable
from posttrain_trainer.rewards.output import Output
from posttrain_trainer.signs import mark

START_SECONDS = 120.0
"""To load a user's file, which may import much."""
SLACK_SECONDS = 2.0
"""After its deadline a process that watches the clock itself has so long to say what it has."""
TICK_SECONDS = 0.1
"""Between looks at the clock and at memory."""
_KILL_SECONDS = 5.0
_MEMORY_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_NOT_INHERITED = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A function that asks torch for its rank must not find ours."""


@dataclass(frozen=True)
class Outcome:
    """What came of a call, after `seconds`. unusable: no call can ever succeed."""

    reply: Reply
    seconds: float
    unusable: bool = False


def memory_share(local_ranks: int) -> int:
    """Bytes that one such process may use: half of the container's memory, shared by its ranks.

    The kernel's own limit would not do: Kubernetes has it end the whole container.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in _MEMORY_FILES:
        with suppress(OSError, ValueError):  # no such cgroup, or no limit ("max")
            total = min(total, int(Path(file).read_text()))
    return total // 2 // local_ranks


class Worker:
    """The process of one reward. `memory`: bytes that it may use."""

    def __init__(self, name: str, task: Task, memory: int) -> None:
        self.name = name
        self._task = task
        self._memory = memory
        self._call: Call | None = None
        self._begun = 0.0
        self._start()

    def begin(self, call: Call) -> None:
        """Scores this next; `look` until it has an outcome."""
        if self._process.poll() is not None:  # ended meanwhile, by the kernel or by a thread of its own
            self._replace()
        self._call, self._begun = call, time.monotonic()
        self._output.begin()
        if self._ready:
            self._hand_over()

    def interests(self) -> list[tuple[Any, int]]:
        """Files and events that are worth a look."""
        writing = selectors.EVENT_WRITE if self._line.writing else 0
        output = [] if self._output.file is None else [(self._output.file, selectors.EVENT_READ)]
        return [(self._line.fileno(), selectors.EVENT_READ | writing), *output]

    def look(self) -> Outcome | None:
        """Never blocks for long. None: the call still runs."""
        dead = self._process.poll() is not None  # before reading: what it said at last is read below
        self._output.look()
        try:
            for message in self._line.look():
                outcome = self._heard(message)
                if outcome is not None:
                    self._output.look()  # what it printed before it answered
                    return outcome
        except ConnectionError:
            dead = True
        problem = self._end() if dead else self._excess()
        return None if problem is None else self._failed(problem)

    def close(self) -> None:
        """Ends the process and what it started."""
        self._kill()
        self._output.end()
        self._line.close()

    def _replace(self) -> None:
        self.close()
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(os.getpid())]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-B", "-X", "faulthandler", "-m", "posttrain_trainer.rewards.child", *arguments],
            env={key: value for key, value in os.environ.items() if not _of_a_rank(key)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        assert self._process.stdout is not None  # by PIPE
        self._output = Output(self.name, os.dup(self._process.stdout.fileno()))
        self._process.stdout.close()
        self._line = Line(ours)
        self._line.put(self._task)
        self._ready = self._killed = False

    def _hand_over(self) -> None:
        assert self._call is not None
        self._line.put(self._call)
        self._sent = time.monotonic()

    def _heard(self, message: object) -> Outcome | None:
        if isinstance(message, Ready):
            self._ready = True
            self._hand_over()
            return None
        self._call = None
        seconds = time.monotonic() - self._begun
        if isinstance(message, Unusable):
            return Outcome(Reply(failure=message.why), seconds, unusable=True)
        assert isinstance(message, Reply)
        return Outcome(message, seconds)

    def _excess(self) -> str | None:
        """The limit that the process has passed, if it has; then it is dead."""
        what = self._too_large() or self._too_late()
        if what is not None:
            self._kill()
        return what

    def _too_large(self) -> str | None:
        used = _resident_bytes(self._process.pid)
        if used <= self._memory:
            return None
        return (
            f"its process used {used / 2**30:.1f} GiB of memory, where it may use {self._memory / 2**30:.1f} (half of "
            "the container's, shared by its ranks). Let it use less, or raise resources.memory"
        )

    def _too_late(self) -> str | None:
        assert self._call is not None
        now = time.monotonic()
        if not self._ready:
            late = now - self._begun > START_SECONDS
            what = f"it was not loaded after {START_SECONDS:g} s. Make what it does at import shorter"
            return what if late else None
        seconds, completions = self._call.seconds, len(self._call.batch)
        slack = 0.0 if self._task.kind == "python" else SLACK_SECONDS
        if now - self._sent <= seconds + slack:
            return None
        return (
            f"no answer for {completions} completions after timeoutSeconds, {seconds:g} s. Raise it, or make "
            "the reward faster"
        )

    def _end(self) -> str:
        """How the process ended by itself."""
        with suppress(subprocess.TimeoutExpired):  # it closed its socket, but lives
            self._process.wait(1.0)
        code = self._process.poll()
        self._kill()
        if code is None:
            return "its process closed its connection. Let it leave files alone that it has not opened"
        if code >= 0:
            return f"its process ended with exit code {code} (os._exit, or a library that ends the process)"
        name = signal.Signals(-code).name
        return f"its process was ended by {name}{', most often for memory' if name == 'SIGKILL' else ''}"

    def _failed(self, problem: str) -> Outcome:
        last = self._output.end()
        printed = f". The last line that it printed: {last[:200]!r}" if last else ""
        outcome = Outcome(Reply(failure=problem + printed), time.monotonic() - self._begun)
        self._call = None
        self._replace()  # it loads while the rank trains
        return outcome

    def _kill(self) -> None:
        if not self._killed:  # a number that is free again could be another group's
            self._killed = True
            with suppress(ProcessLookupError):  # it and what it started are gone
                os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # in the kernel's hands, as on a dead network volume
            self._process.wait(_KILL_SECONDS)


def call_all(calls: Sequence[tuple[Worker, Call]]) -> list[Outcome]:
    """All calls at once, each to its own worker; the outcomes in their order."""
    for worker, call in calls:
        worker.begin(call)
    outcomes: dict[int, Outcome] = {}
    while True:
        for place, (worker, _) in enumerate(calls):
            outcome = None if place in outcomes else worker.look()
            if outcome is not None:
                outcomes[place] = outcome
        if len(outcomes) == len(calls):
            return [outcomes[place] for place in range(len(calls))]
        mark()  # every call has a deadline of its own, which may be later than a hang's
        _wait([worker for place, (worker, _) in enumerate(calls) if place not in outcomes])


def _wait(workers: Sequence[Worker]) -> None:
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            for file, events in worker.interests():
                selector.register(file, events)
        selector.select(TICK_SECONDS)


def _of_a_rank(variable: str) -> bool:
    return variable in _NOT_INHERITED or variable.startswith("TORCHELASTIC_")


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it has just ended
        return 0
