"""The files of one rank on their way from the node to the storage, while the rank trains on.

Used by checkpoint_write.py. A thread copies and hashes what was read on the node: what the storage makes of it is found
by the digest. It leaves no sign of life of its own: a copy that gets on says nothing about a training that hangs.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from posttrain_api.reasons import Reason
from posttrain_trainer.checkpoint_files import FileEntry
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.signs import mark

_BLOCK = 1 << 22
_SYNC = 1 << 26
"""Bytes after which the disk is waited for: the page cache would take gigabytes at once, and fsync then minutes in
which nothing shows that the copy gets on."""
_LOOK_SECONDS = 1.0


class Copy:
    """Begins at once. `source`: a folder that nobody writes any more; `target`: one that is there. `sizes`: bytes of
    each file below `source`, by its name."""

    def __init__(self, source: Path, target: Path, sizes: Mapping[str, int]) -> None:
        self._source, self._target, self._sizes = source, target, sizes
        self._moved = 0
        self._entries: dict[str, FileEntry] = {}
        self._error: Exception | None = None
        self._ended = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True, name="posttrain-copy")
        self._thread.start()

    @property
    def running(self) -> bool:
        """False once everything is there, or nothing more will be."""
        return self._thread.is_alive()

    def wait(self) -> tuple[dict[str, FileEntry], float]:
        """Size and digest of each file by its name below the folders, and the time (monotonic, seconds) at which the
        last one was on the disk. Raises what has ended the copy, and OSError where less came than was to."""
        before = self._moved
        while self._thread.is_alive():
            self._thread.join(_LOOK_SECONDS)
            if self._moved != before:
                mark()
            before = self._moved
        if self._error is not None:
            raise self._error
        if (copied := {name: entry.size for name, entry in self._entries.items()}) != self._sizes:
            raise OSError(errno.EIO, f"copied {copied}, where {dict(self._sizes)} was to come", str(self._target))
        return self._entries, self._ended

    def _run(self) -> None:
        try:
            for name in self._sizes:
                for folder in reversed(Path(name).parents[:-1]):  # not the target: who removed it means this copy too
                    (self._target / folder).mkdir(exist_ok=True)
                self._entries[name] = self._file(self._source / name, self._target / name)
        except Exception as error:  # noqa: BLE001  `wait` raises it, where somebody can act on it
            self._error = _removed(self._target) if _is_gone(self._target) else error
        self._ended = time.monotonic()

    def _file(self, source: Path, target: Path) -> FileEntry:
        digest, size, unsynced = hashlib.sha256(), 0, 0
        with source.open("rb") as reader, target.open("wb", buffering=0) as writer:
            while block := reader.read(_BLOCK):
                _write_all(writer.fileno(), block)
                digest.update(block)
                size, unsynced = size + len(block), unsynced + len(block)
                self._moved += len(block)
                if unsynced >= _SYNC:
                    os.fdatasync(writer.fileno())
                    unsynced = 0
            os.fsync(writer.fileno())
        return FileEntry(size=size, sha256="sha256:" + digest.hexdigest())


def _is_gone(target: Path) -> bool:
    """A storage that does not even say whether it is there is the cause itself."""
    try:
        target.stat()
    except OSError as error:
        return error.errno == errno.ENOENT
    return False


def _removed(target: Path) -> TrainerFailure:
    """Not the cause: whoever removed it has a reason of its own."""
    message = f"{target}: removed while it was written: the copy of another rank has failed, or a newer attempt runs."
    return TrainerFailure(Reason.PEER_LOST, message)


def _write_all(descriptor: int, block: bytes) -> None:
    """A nearly full file system takes a part; the next call then says that it is full."""
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]
