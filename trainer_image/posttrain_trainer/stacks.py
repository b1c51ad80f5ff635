"""The stacks of this pod's ranks: asked for by a signal, read from files, with one line that says where each rank is.

Called by the launcher when the job has stood still for too long. A rank that is stopped, or deep in the kernel, cannot
answer; then that is what is told, from /proc.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from posttrain_api.records import MAX_STACKS_BYTES, MAX_WHERE
from posttrain_trainer import signs

ANSWER_SECONDS = 5.0
"""What a rank has to write its stacks. It takes milliseconds; a machine that swaps takes longer."""
_QUIET_SECONDS = 0.3
_POLL_SECONDS = 0.05
_THREAD = re.compile(r"^(Current thread|Thread) 0x.*$", re.MULTILINE)
_FRAME = re.compile(r'^  File "([^"]*)", line (\d+) in (.*)$', re.MULTILINE)
_OURS = "/posttrain_trainer/"
_OUR_FRAMES = 3
_STATES = {
    "T": "it is stopped (state T, as by SIGSTOP) and writes no stacks until SIGCONT",
    "t": "a debugger holds it (state t) and it writes no stacks until that lets go",
    "D": "it waits in the kernel for a device or a file system (state D) and writes no stacks",
    "Z": "its process has ended",
    "X": "its process has ended",
}
_SILENT = "it did not write its stacks"
CANNOT = "cannot answer: "
"""How the line of a rank begins that wrote no stacks."""


@dataclass(frozen=True)
class Stack:
    """`where`: one line, at most MAX_WHERE characters. `text`: at most 16 KiB, `where` is its first line."""

    rank: int
    where: str
    text: str

    @property
    def answered(self) -> bool:
        return not self.where.startswith(CANNOT)


@dataclass(frozen=True)
class Hang:
    """A run that stood still for `seconds` and was ended by its launcher, whose limit was `limit`. `step`: the last
    that is known here. `kept`: the stacks' folder on the job's storage; None: it did not take them."""

    seconds: float
    limit: float
    step: int | None
    stacks: Sequence[Stack]
    kept: str | None


@dataclass
class _Asked:
    """A rank on its way to an answer. `begin`: size of its file before."""

    rank: int
    file: Path
    process: int | None
    begin: int
    size: int = 0
    since: float = 0.0

    def done(self, now: float) -> bool:
        """Whether it has written and is quiet since, or never will."""
        if self.process is None or _state(self.process) in _STATES:
            return True
        size = _size(self.file)
        if size != self.size:
            self.size, self.since = size, now
        return self.size > self.begin and now - self.since >= _QUIET_SECONDS


def collect(folder: Path, ranks: Iterable[int], parent: int | None, seconds: float = ANSWER_SECONDS) -> list[Stack]:
    """One for each rank, in their order; takes so many seconds at most. `parent`: the process that started the ranks;
    a number that now belongs to another process is never signalled."""
    asked = [_ask(folder, rank, parent) for rank in ranks]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(each.done(time.monotonic()) for each in asked):
        time.sleep(_POLL_SECONDS)
    return [_read(each) for each in asked]


def _ask(folder: Path, rank: int, parent: int | None) -> _Asked:
    file = signs.stacks_file(folder, rank)
    process = _process(signs.process_file(folder, rank), parent)
    begin = _size(file)
    if process is not None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(process, signs.DUMP_SIGNAL)
    return _Asked(rank, file, process, begin, begin, time.monotonic())


def _process(file: Path, parent: int | None) -> int | None:
    try:
        process = int(file.read_text())
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):  # it has not begun, or has ended
        return None
    return process if parent is None or int(fields[1]) == parent else None


def _read(asked: _Asked) -> Stack:
    with suppress(FileNotFoundError), asked.file.open("rb") as file:
        file.seek(asked.begin)
        written = file.read(4 * MAX_STACKS_BYTES).decode(errors="replace")
        if _THREAD.search(written):
            return _stack(asked, where_of(written), written)
    return _stack(asked, CANNOT + _why(asked.process), "")


def _stack(asked: _Asked, where: str, written: str) -> Stack:
    where = where[:MAX_WHERE]
    return Stack(asked.rank, where, cut("\n".join([where, *_process_line(asked.process), main_first(written)])))


def _why(process: int | None) -> str:
    if process is None:
        return "it has not begun, or its process has ended"
    return _STATES.get(_state(process), _SILENT)


def _process_line(process: int | None) -> list[str]:
    """`process 123: state S, in futex_wait_queue`; nothing where it has ended."""
    if process is None:
        return []
    waits = _text(Path(f"/proc/{process}/wchan"))
    place = f", in {waits}" if waits not in ("", "0") else ""
    return [f"process {process}: state {_state(process) or 'unknown'}{place}"]


def _state(process: int) -> str:
    """The letter of /proc/<pid>/stat; empty where there is no such process."""
    return _text(Path(f"/proc/{process}/stat")).rpartition(")")[2].strip()[:1]


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # it has just ended, or the kernel does not tell
        return ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def blocks(text: str) -> list[str]:
    """faulthandler's text by thread, in its order: the newest thread first, the main thread last."""
    starts = [found.start() for found in _THREAD.finditer(text)]
    return [text[begin:end].strip("\n") for begin, end in pairwise([*starts, len(text)])]


def main_first(text: str) -> str:
    """The same, the main thread before the others: where a text is cut, it is kept."""
    found = blocks(text)
    return "\n\n".join([*found[-1:], *found[:-1]])


def where_of(text: str) -> str:
    """`all_reduce (distributed_c10d.py:2805) < _reduce (runtime.py:118) < …`: the innermost call of the main thread,
    then the innermost ones of the trainer."""
    found = blocks(text)
    frames = _FRAME.findall(found[-1]) if found else []
    ours = [frame for frame in frames[1:] if _OURS in frame[0]][:_OUR_FRAMES]
    shown = [f"{function} ({file.rpartition('/')[2]}:{line})" for file, line, function in [*frames[:1], *ours]]
    return " < ".join(shown) or "in no Python code"


def cut(text: str) -> str:
    """At most MAX_STACKS_BYTES in UTF-8."""
    data = text.strip().encode()
    if len(data) <= MAX_STACKS_BYTES:
        return data.decode()
    note = "\n… cut"
    return data[: MAX_STACKS_BYTES - len(note.encode())].decode(errors="ignore") + note
