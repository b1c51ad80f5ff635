"""What forked ranks run in the tests of staged checkpoints: copies that are held until something else has happened, and
a list of what happened in which order.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import trainer_jobs

from posttrain_trainer import checkpoint_files as files_module
from posttrain_trainer.checkpoint import Checkpoints
from posttrain_trainer.checkpoint_copy import Copy
from posttrain_trainer.checkpoint_write import Writer
from posttrain_trainer.recorder import Recorder
from posttrain_trainer.rewards.reward_set import RewardSet

WAITED = "waited"
"""Held until the rank itself waits for its copy."""
_DEADLINE = 60.0


def held(rank: int, step: int, until: int | str, *job: Any) -> None:
    """A worker on whose `rank` the copy of `step` goes on only when the line of step `until` is written (or WAITED);
    one step later rank 0 lets it end. All keep `events`. job: another function of this module and its arguments, before
    the worker."""
    due, copy, wait = threading.Event(), Copy._file, Copy.wait
    name = f"step-{step:06d}.tmp-1"
    here = os.environ["RANK"] == str(rank)

    def wait_and_free(self: Copy) -> Any:
        if until == WAITED and name in str(self._target):
            due.set()
        return wait(self)

    def copy_later(self: Copy, source: Path, target: Path) -> Any:
        if here and name in str(target):
            assert _told(_run_dir(), f"step {until}") if until != WAITED else due.wait(_DEADLINE), "it was not to be"
        return copy(self, source, target)

    Copy.wait = wait_and_free  # type: ignore[method-assign]
    Copy._file = copy_later  # type: ignore[method-assign]
    _keep_events(here)
    if until != WAITED:
        _after_line(int(until) + 1, lambda run_dir: _told(run_dir, f"copied {step}"))
    if job:
        globals()[job[0]](*job[1:])
    trainer_jobs.work()


def term_after_line(step: int) -> None:
    """SIGTERM to rank 0 when it has written the line of `step`."""
    _after_line(step, lambda _: os.kill(os.getpid(), signal.SIGTERM))


def term_in_copy() -> None:
    """SIGTERM to rank 0 when its first copy has begun: in the step after, which is dropped."""
    run = Copy._run

    def run_and_term(self: Copy) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        run(self)

    if os.environ["RANK"] == "0":
        Copy._run = run_and_term  # type: ignore[method-assign]


def killed_after_line(step: int) -> None:
    """SIGKILL."""
    _after_line(step, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def nearly_full_node(parts: float) -> None:
    """Every node has room for so many parts of a rank."""
    room = Writer.room
    Writer.room = lambda self: replace(found := room(self), free=int(parts * found.part))  # type: ignore[method-assign]


def full_in_copy(step: int) -> None:
    """The storage takes nothing more of rank 1's copy of `step`, nor anything else while this lies there."""
    copy, replace_json = Copy._file, files_module.replace_json

    def copy_or_fail(self: Copy, source: Path, target: Path) -> Any:
        entry = copy(self, source, target)
        if os.environ["RANK"] == "1" and f"step-{step:06d}.tmp-1" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return entry

    def replace_or_fail(path: Path, document: Any) -> None:
        if path.name == files_module.GOOD and (path.parent / f"step-{step:06d}.tmp-1").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        replace_json(path, document)

    Copy._file = copy_or_fail  # type: ignore[method-assign]
    files_module.replace_json = replace_or_fail


def reward_fails(step: int) -> None:
    """On rank 1, once the line of `step` is written."""
    agree = RewardSet._agree

    def agree_or_fail(self: RewardSet, fatal: str | None) -> None:
        fails = os.environ["RANK"] == "1" and f"step {step}" in events_of(_run_dir())
        agree(self, "reward 'twenties': it is gone" if fails else fatal)

    RewardSet._agree = agree_or_fail  # type: ignore[method-assign]


def _after_line(step: int, what: Callable[[Path], Any]) -> None:
    write = Recorder.step

    def write_and_act(recorder: Recorder, done: int, metrics: dict[str, float]) -> None:
        write(recorder, done, metrics)
        if done == step and os.environ["RANK"] == "0":
            what(_run_dir())

    Recorder.step = write_and_act  # type: ignore[method-assign]


def _told(run_dir: Path, event: str) -> bool:
    """Whether it has happened, at last."""
    deadline = time.monotonic() + _DEADLINE
    while time.monotonic() < deadline:
        if event in events_of(run_dir):
            return True
        time.sleep(0.02)
    return False


def events_of(run_dir: Path) -> list[str]:
    """What has happened: `step N` (its line is written), `copied N` (of the rank that was held), `commit N`,
    `good N` (others know of it)."""
    path = run_dir / "events"
    return path.read_text().splitlines() if path.exists() else []


def _run_dir() -> Path:
    return Path(os.environ["POSTTRAIN_CONFIG"]).parent


def _keep_events(held: bool) -> None:
    write, commit, run, end_at = Recorder.step, files_module.commit, Copy._run, Checkpoints.end_at

    def note(what: str, here: bool) -> None:
        if here:
            with (_run_dir() / "events").open("a") as file:
                file.write(f"{what}\n")

    def write_and_note(recorder: Recorder, done: int, metrics: dict[str, float]) -> None:
        write(recorder, done, metrics)
        note(f"step {done}", os.environ["RANK"] == "0")

    def commit_and_note(temporary: Path, final: Path, manifest: Any) -> None:
        commit(temporary, final, manifest)
        note(f"commit {manifest.step}", True)

    def run_and_note(self: Copy) -> None:
        run(self)
        note(f"copied {int(self._target.name[5:11])}", held)

    def end_and_note(self: Checkpoints, step: int) -> None:
        end_at(self, step)
        note(f"good {step}", True)

    Checkpoints.end_at = end_and_note  # type: ignore[method-assign]
    Recorder.step = write_and_note  # type: ignore[method-assign]
    files_module.commit = commit_and_note
    Copy._run = run_and_note  # type: ignore[method-assign]
