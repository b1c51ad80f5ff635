"""What a rank leaves for the launcher of its pod while it runs: that it got on, what it reports, and its stacks.

Files in a folder of the pod's own: a rank that hangs, is stopped, or holds Python's lock while it saves can tell
nothing over a network, and the launcher must see exactly that. `mark` may be called anywhere in a rank; where no
launcher started it ($POSTTRAIN_SIGNS is unset) nothing happens.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from posttrain_api.records import MAX_METRICS, Report

log = logging.getLogger(__name__)
ENV_SIGNS = "POSTTRAIN_SIGNS"
"""The folder, set by the launcher."""
FOLDER = "signs"
"""Its name below work_dir."""
MARK = "mark-"
OTHERS = "others"
"""In the place of a rank: something got on, on another node."""
PREPARE = "prepare"
REPORT = "report.json"
GROWTH_SECONDS = 10.0
DUMP_SIGNAL = signal.SIGUSR1
"""A rank that can take it answers with the stacks of all its threads."""


class _Process:
    """Of this process: whether its marks count."""

    watched = False


def begin() -> None:
    """From here on this process is expected to get on, and its marks count: the loop begins. How long it may take to
    load a model is not for a watch over the loop to say."""
    _Process.watched = True
    mark()


def mark() -> None:
    """This process got on: one more micro-batch, file, chunk or look at something that has a deadline of its own.

    A hang is judged on it, so it must not be called by anything that goes on by itself while the work stands still.
    """
    folder = os.environ.get(ENV_SIGNS)
    if folder and _Process.watched:
        touch(Path(folder), os.environ.get("RANK", PREPARE))


@contextmanager
def growing(folder: Path, seconds: float = GROWTH_SECONDS) -> Iterator[None]:
    """Inside it this process gets on as long as the files below `folder` change their sizes: a library that writes a
    large model for an hour tells nobody how far it is."""
    ended = threading.Event()
    thread = threading.Thread(target=_watch_growth, args=(folder, seconds, ended), daemon=True, name="posttrain-growth")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch_growth(folder: Path, seconds: float, ended: threading.Event) -> None:
    before = None
    while not ended.wait(seconds):
        now = _sizes(folder)
        if now != before:
            mark()
        before = now


def _sizes(folder: Path) -> dict[str, int]:
    sizes = {}
    for base, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it was renamed or removed meanwhile: that shows too
                sizes[f"{base}/{name}"] = os.stat(f"{base}/{name}").st_size
    return sizes


def touch(folder: Path, name: str) -> None:
    """The mark of rank `name` is of now."""
    path = folder / f"{MARK}{name}"
    try:
        os.utime(path)
    except FileNotFoundError:
        path.touch()


def marks(folder: Path, but: str | None = None) -> dict[str, int]:
    """The time of each mark, for comparing: any change means that something got on, also where the clock was set
    back. `but`: a mark that does not count."""
    found = [path for path in folder.glob(f"{MARK}*") if path.name != f"{MARK}{but}"]
    return {path.name: path.stat().st_mtime_ns for path in found}


def stacks_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return folder / f"stacks-{rank}"


def process_file(folder: Path, rank: int) -> Path:
    """Where a rank says which process it is, once it can answer: the signal would end one that cannot."""
    return folder / f"process-{rank}"


def answer_dumps(rank: int) -> None:
    """From now on DUMP_SIGNAL writes the stacks of all threads. Done in C and without Python's lock: it works while
    the rank is inside a collective or another call that does not come back."""
    folder = os.environ.get(ENV_SIGNS)
    if folder:
        out = stacks_file(Path(folder), rank).open("ab", buffering=0)
        faulthandler.register(DUMP_SIGNAL, file=out, all_threads=True)
        process_file(Path(folder), rank).write_text(str(os.getpid()))


class ReportFile:
    """A sink of the recorder on rank 0: the newest report, for the launcher to send."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._failing = False

    @classmethod
    def from_env(cls, environment: Mapping[str, str]) -> ReportFile:
        """As the launcher says it."""
        folder = environment.get(ENV_SIGNS)
        return cls(Path(folder) / REPORT if folder else None)

    def report(self, report: Report) -> None:
        """Takes the newest report; whole or not at all. A report is a courtesy: a full disk must not end training."""
        if self._path is None:
            return
        text = report.model_copy(update={"metrics": finite_metrics(report.metrics)}).to_json()
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        try:
            temporary.write_text(text)
            temporary.replace(self._path)
        except OSError as error:
            if not self._failing:
                log.warning("%s: reports cannot be left here, training goes on: %s", self._path, error)
            self._failing = True
        else:
            self._failing = False

    def close(self) -> None:
        """The last report stays for the launcher."""


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """What of a metric dict may go into a Report: finite numbers, at most MAX_METRICS, the first ones kept."""
    finite = [(name, float(value)) for name, value in metrics.items() if math.isfinite(value)]
    return dict(finite[:MAX_METRICS])
