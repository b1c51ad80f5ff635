"""What a forked rank does on a storage of a few pages: real saves on a real file system, as often as it has sizes."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trainer_jobs import _mount_small

from posttrain_trainer import checkpoint_files as files
from posttrain_trainer.checkpoint import Checkpoints
from posttrain_trainer.checkpoint_choice import Place
from posttrain_trainer.checkpoint_facts import Facts
from posttrain_trainer.checkpoint_write import Content
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.fence import Fence
from posttrain_trainer.randomness import random_state
from posttrain_trainer.runtime import Control, Runtime, StopFlag
from posttrain_trainer.state import State

PAGE = 4096
WEIGHTS = 6 * PAGE
"""Bytes of each of the two files that the model of these tests writes."""
LAYOUT: dict[str, Any] = {"world size": 1, "deepspeed.zeroStage": 0, "deepspeed.overrides": None}
FACTS = Facts({"training.seed": 7}, LAYOUT, {})
_MS_RDONLY, _MS_REMOUNT = 1, 32
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass
class Weights:
    """Saves as DeepSpeed does: by torch.save, two files in a folder."""

    loaded: list[Path] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        (folder / "ds").mkdir(exist_ok=True)
        for name in ("model.pt", "optimizer.pt"):
            torch.save(torch.zeros(WEIGHTS // 4), folder / "ds" / name)

    def load(self, folder: Path) -> None:
        self.loaded.append(folder)

    def adopt(self, folder: Path, written: Any) -> None:
        raise AssertionError(f"{folder} is of these very ranks, and not {written}")


def checkpoints(
    run_dir: Path, keep: int = 5, attempt: int = 1, staging: Path | None = None, rank: int = 0
) -> Checkpoints:
    runtime = Runtime(rank, rank, 1, torch.device("cpu"), Control(None, 1), StopFlag())
    place = Place(run_dir, "pvc://runs/job/u1", keep, resume=True, staging=staging)
    return Checkpoints(place, runtime, FACTS, Fence(run_dir, attempt))


def content(step: int, **state: Any) -> Content:
    return Content(Weights(), State(step=step, **state), random_state())


def save(store: Checkpoints, step: int) -> str | None:
    """None where it is committed, else the reason. Staged where the store stages."""
    try:
        if store.can_stage():
            store.stage(content(step))
            store.land()
        else:
            store.save(content(step))
    except TrainerFailure as failure:
        return str(failure.reason)
    return None


def found(run_dir: Path) -> dict[str, Any]:
    """What is there: whole ones, newest first; names of what else is below the folder."""
    root = run_dir / "checkpoints"
    entries = files.committed(root)
    whole = [entry.manifest.step for entry in entries if files.damaged(entry, entry.manifest.files) is None]
    other = sorted(path.name for path in root.iterdir() if path.name not in [entry.folder.name for entry in entries])
    return {"committed": [entry.manifest.step for entry in entries], "whole": whole, "other": other}


def every_size(folder: str, staging: str | None, what: str, most: int, result: str) -> None:
    """For each number up to `most` of pages or inodes (`what`) that are left: a checkpoint of step 2 while there is
    room, then a save of step 4 with so many left, then what the next attempt resumes from. `staging`: the node's
    folder, elsewhere."""
    root = Path(folder)
    root.mkdir()
    problem = _mount_small(root, "64m")
    trials = (
        [] if problem else [_trial(root / str(left), staging and Path(staging), what, left) for left in range(most)]
    )
    Path(result).write_text(json.dumps({"skipped": problem, "trials": trials}))


def _trial(run_dir: Path, staging: Path | None, what: str, left: int) -> dict[str, Any]:
    run_dir.mkdir()
    assert checkpoints(run_dir, staging=staging).can_stage() == (staging is not None)
    _mount(run_dir, "size=1m")
    (run_dir / "checkpoints").mkdir()
    first = save(checkpoints(run_dir, staging=staging), 2)
    now = os.statvfs(run_dir)
    pages, inodes = now.f_blocks - now.f_bfree + left, now.f_files - now.f_ffree + left
    _mount(run_dir, f"size={pages * now.f_bsize}" if what == "pages" else f"nr_inodes={inodes}", _MS_REMOUNT)
    reason = save(checkpoints(run_dir, staging=staging), 4)
    kept = found(run_dir)
    weights = Weights()
    resumed = checkpoints(run_dir, attempt=2).resume(weights).step
    began = {"left": left, "first": first, "reason": reason}
    return {**began, **kept, "resumed": resumed, "from": weights.loaded[0].name}


def small_node(folder: str, pages: int, result: str) -> None:
    """Two saves, staged on a node that has room for one of so many pages and then for none; a third that is not. Then
    one on a node that can only be read."""
    root = Path(folder)
    staging = root / "staging"
    staging.mkdir(parents=True)
    problem = _mount_small(staging, str(pages * PAGE))
    told: dict[str, Any] = {"skipped": problem}
    if not problem:
        (root / "checkpoints").mkdir()
        store = checkpoints(root, staging=staging)
        told["first"] = save(store, 2)
        (staging / "filler").write_bytes(bytes(pages * PAGE // 2))
        told |= {"full": _refused(store.stage, 4), **found(root)}
        told["left"] = sorted(path.name for path in staging.iterdir())
        told |= {"can": store.can_stage(), "third": save(store, 6), "now": found(root)["whole"]}
        (staging / "rank-00000").mkdir()  # what a save has left when the disk turned read-only
        _mount(staging, f"size={pages * PAGE}", _MS_REMOUNT | _MS_RDONLY)
        told["fixed"] = _refused(store.stage, 8)
    Path(result).write_text(json.dumps(told))


def _refused(save: Callable[[Content], None], step: int) -> tuple[str, str] | None:
    """Reason and message of what does not go."""
    try:
        save(content(step))
    except TrainerFailure as failure:
        return failure.reason, failure.message
    return None


def read_only(folder: str, result: str) -> None:
    """A storage that becomes read-only between two saves."""
    root = Path(folder)
    root.mkdir()
    problem = _mount_small(root, "1m")
    told: dict[str, Any] = {"skipped": problem}
    if not problem:
        (root / "checkpoints").mkdir()
        store = checkpoints(root)
        told["first"] = save(store, 2)
        _mount(root, "size=1m", _MS_REMOUNT | _MS_RDONLY)
        told |= {"refused": _refused(store.save, 4)} | found(root)
    Path(result).write_text(json.dumps(told))


def room(folder: str, staging: str | None, bytes_: int, result: str) -> None:
    """Six saves, with three of them kept, on a storage that has no room for a fourth; then one where the newest is
    damaged. `staging`: the node's folder, elsewhere."""
    root = Path(folder)
    root.mkdir()
    problem = _mount_small(root, str(bytes_))
    told: dict[str, Any] = {"skipped": problem}
    if not problem:
        (root / "checkpoints").mkdir()
        store = checkpoints(root, keep=3, staging=staging and Path(staging))
        assert store.can_stage() == (staging is not None)
        told["reasons"] = [save(store, step) for step in range(1, 7)]
        told["healthy"] = found(root)
        (root / "checkpoints" / "step-000006" / "ds" / "model.pt").write_bytes(b"torn")
        filler = root / "filler"  # the room that the damage has given back
        filler.write_bytes(bytes(WEIGHTS))
        told["damaged"] = save(store, 7)
        told["left"] = found(root)
    Path(result).write_text(json.dumps(told))


def _mount(path: Path, options: str, flags: int = 0) -> None:
    if _LIBC.mount(b"tmpfs", bytes(path), b"tmpfs", flags, options.encode()):
        raise OSError(ctypes.get_errno(), f"mounting {path} with {options}")
