"""Three things that only Linux knows: orphans come to us, children end with us, and what the kernel killed for
memory."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")


def adopt_orphans() -> None:
    """Descendants whose parent ends become our children, as they do for process 1 of a container."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """The kernel sends us this signal when the thread that started us is gone."""
    _prctl(_PR_SET_PDEATHSIG, number)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def children() -> list[int]:
    """Process ids of our children, zombies included."""
    ours = os.getpid()
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue
        if int(fields[1]) == ours:
            found.append(int(stat.parent.name))
    return found


def out_of_memory_kills(events: Path = MEMORY_EVENTS) -> int:
    """How many processes of this container the kernel has killed for memory; 0 where that is not to be seen."""
    try:
        lines = events.read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split() for line in lines)
    return int(counts.get("oom_kill", 0))
