"""What a storage that is full or cannot be written does to a save, in words. Used by checkpoint.py.

The libraries that write checkpoints hide the number of the error; a file of our own then says which it is.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from posttrain_api.reasons import Reason
from posttrain_trainer.checkpoint_files import Committed, committed, prune
from posttrain_trainer.errors import TrainerFailure, classify

ROOM = 1.02
"""A checkpoint is as large as the one before it; metrics and block sizes come to it."""
_HIDDEN = ("inline_container", "iostream error", "PytorchStreamWriter")
"""torch.save names its own source file, or, where the file system fails while the file is closed, only the stream."""
_STORAGE = (Reason.STORAGE_FULL, Reason.STORAGE_READ_ONLY)


def has_room(root: Path, newest: Committed) -> bool:
    """Whether another checkpoint of this size fits."""
    return shutil.disk_usage(root).free >= ROOM * newest.size_bytes


def make_room(root: Path, newest: Committed, spared: Collection[int]) -> list[str]:
    """Removes the oldest, one by one, until another one fits: never the newest, nor those of the steps `spared`. Names
    of what was removed."""
    removed: list[str] = []
    for keep in range(len(committed(root)) - 1, 0, -1):
        if has_room(root, newest):
            break
        removed += [folder.name for folder in prune(root, keep, spared)]
    return removed


def storage_failure(error: Exception, root: Path, uri: str) -> TrainerFailure | None:
    """The failure where `error` is of a storage that takes nothing more; None where it is of something else. `uri`: of
    the run; it names the claim, as the path in the pod does not."""
    reason = refusal(error, root)
    if reason is Reason.STORAGE_READ_ONLY:
        return TrainerFailure(
            reason,
            f"{uri}: the checkpoint could not be written, the volume is mounted read-only ({error}). The older "
            "checkpoints are whole. Have the volume repaired or mounted to be written, then run the job anew.",
        )
    if reason is not Reason.STORAGE_FULL:
        return None
    free = shutil.disk_usage(root).free
    return TrainerFailure(
        reason,
        f"{uri}: the checkpoint could not be written, {free:,} bytes were free then ({error}). The older checkpoints "
        "are whole. Enlarge or empty the claim, or lower checkpoint.keepLast, then run the job anew.",
    )


def refusal(error: Exception, root: Path) -> Reason | None:
    """StorageFull or StorageReadOnly where `error` says that the file system of `root` takes nothing more."""
    if isinstance(error, TrainerFailure):
        return None
    hidden = isinstance(error, RuntimeError) and any(part in str(error) for part in _HIDDEN)
    reason = _probe(root) if hidden else classify(error)[0]
    return reason if reason in _STORAGE else None


def _probe(root: Path) -> Reason:
    """Which of the two it is: a read-only volume takes not even a name."""
    path = root / f".probe-{os.getpid()}"
    try:
        path.touch()
    except OSError as error:
        return Reason.STORAGE_READ_ONLY if error.errno == errno.EROFS else Reason.STORAGE_FULL
    with suppress(OSError):
        path.unlink()
    return Reason.STORAGE_FULL
