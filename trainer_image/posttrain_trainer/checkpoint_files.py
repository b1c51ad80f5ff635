"""Checkpoint folders on storage: what makes one committed, whole, old or torn. No torch, no DeepSpeed.

Used by checkpoint.py. A folder is written under a temporary name, its manifest last, then renamed: a folder without
a manifest was never finished and is skipped. A manifest lists size and sha256 of each file, and a loader believes
nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain_api.base import Model
from posttrain_trainer.signs import mark

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
GOOD = "good.json"
"""Beside the folders of a training that a guard has ended: the step of the checkpoint from before."""
_PREFIX = "step-"
_OLD = ".old-"
_BLOCK = 1 << 22


class FileEntry(Model):
    """Size in bytes and sha256 (`sha256:<hex>`) of one file."""

    size: int
    sha256: str


class Manifest(Model):
    """The commit. `time` is RFC 3339 in UTC; `attempt` is the attempt that wrote it; file names are relative;
    `save_seconds`: how long it took until here (None: of a release that did not measure it)."""

    step: int
    time: str
    attempt: int
    files: dict[str, FileEntry]
    save_seconds: float | None = None


@dataclass(frozen=True)
class Committed:
    """A folder with a readable manifest."""

    folder: Path
    manifest: Manifest

    @property
    def size_bytes(self) -> int:
        """Of all its files, the manifest not counted."""
        return sum(entry.size for entry in self.manifest.files.values())

    @property
    def digest(self) -> str:
        """Of the manifest, and so of everything."""
        return file_digest(self.folder / MANIFEST)


def folder_of(root: Path, step: int) -> Path:
    """Name of the committed folder of a step."""
    return root / f"{_PREFIX}{step:06d}"


def temporary_of(root: Path, step: int, attempt: int) -> Path:
    """Name while it is being written: another attempt never writes into the same."""
    return root / f"{_PREFIX}{step:06d}.tmp-{attempt}"


def folders(root: Path) -> list[Path]:
    """Every folder that has the name of a committed one, in no order."""
    return [path for path in root.glob(_PREFIX + "*") if path.name.removeprefix(_PREFIX).isdigit()]


def committed(root: Path) -> list[Committed]:
    """Every committed folder, the newest step first. Folders without a manifest, temporary ones and those that the
    storage cannot read now are left out: an older checkpoint is better than none."""
    return _newest_first(map(_readable, folders(root)))


def all_committed(root: Path) -> list[Committed]:
    """The same; OSError where the storage cannot read one now. For who finds none: it may be whole."""
    return _newest_first(map(read_committed, folders(root)))


def _newest_first(found: Iterable[Committed | None]) -> list[Committed]:
    entries = (entry for entry in found if entry is not None)
    return sorted(entries, key=lambda entry: entry.manifest.step, reverse=True)


def _readable(folder: Path) -> Committed | None:
    try:
        return read_committed(folder)
    except OSError as error:
        log.warning("%s: its %s cannot be read: %s", folder, MANIFEST, error.strerror)
        return None


def good_step(root: Path) -> int | None:
    """The newest step that others should start from; None where no guard has ended the training."""
    try:
        return int(json.loads((root / GOOD).read_text())["step"])
    except FileNotFoundError:
        return None


def read_committed(folder: Path) -> Committed | None:
    """The folder with its manifest; None where there is none, or one cut by a crash of a storage without atomic rename.
    OSError where the storage cannot read it: that says nothing about what it holds."""
    try:
        return Committed(folder, Manifest.model_validate_json((folder / MANIFEST).read_bytes()))
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def files_below(folder: Path) -> list[str]:
    """Relative names of all files, sorted; the manifest is not among them."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def entries(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and digest of each file, after it has reached the disk."""
    found = {}
    for name in names:
        sync(folder / name)
        found[name] = FileEntry(size=(folder / name).stat().st_size, sha256=file_digest(folder / name))
    return found


def damaged(entry: Committed, names: Iterable[str]) -> str | None:
    """The first of these files that is not what the manifest says, in words; None where all are whole."""
    for name in names:
        expected, path = entry.manifest.files[name], entry.folder / name
        try:
            found = _differs(path, expected)
        except OSError as error:
            found = f"cannot be read: {error.strerror}"
        if found:
            return f"{path}: {found}"
    return None


def _differs(path: Path, expected: FileEntry) -> str | None:
    size = path.stat().st_size if path.exists() else None
    if size != expected.size:
        return f"{'missing' if size is None else f'{size} bytes'}, the manifest says {expected.size} bytes"
    digest = file_digest(path)
    return None if digest == expected.sha256 else f"{digest}, the manifest says {expected.sha256}"


def commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Manifest, fsync, rename. A folder of that name (damaged, or of an attempt that was not to be resumed) gives
    way. The files are on the disk already, their names are not."""
    write_json(temporary / MANIFEST, manifest.to_wire())
    for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        sync(folder)
    old = final.with_name(f"{final.name}{_OLD}{manifest.attempt}")
    if final.exists():
        final.rename(old)  # not removed yet: killed here, the next attempt still has it
    temporary.rename(final)
    sync(final.parent)
    if old.exists():
        shutil.rmtree(old)


def prune(root: Path, keep: int, spared: Collection[int] = ()) -> list[Path]:
    """Removes all but the last `keep` by the order in which they were committed, and those of the steps `spared`; call
    it after a commit, never before."""
    ordered = sorted(committed(root), key=lambda entry: (entry.manifest.attempt, entry.manifest.step))
    old = [entry for entry in ordered[:-keep] if entry.manifest.step not in spared]
    for entry in old:
        (entry.folder / MANIFEST).unlink()  # first: a folder that is half removed must not look committed
        shutil.rmtree(entry.folder)
    return [entry.folder for entry in old]


def bring_back(root: Path) -> None:
    """What an attempt before was about to replace, and has not, takes its name again."""
    for path in root.glob(f"{_PREFIX}*{_OLD}*"):
        final = path.with_name(path.name.partition(_OLD)[0])
        if not final.exists():
            path.rename(final)


def remove_unfinished(root: Path) -> None:
    """Removes what attempts before left half written or half removed. After `bring_back`, and once it is known that
    something else is there to go on from: what is damaged may be somebody's last hope."""
    for path in root.glob(f"{_PREFIX}*"):
        committed_once = path.name.removeprefix(_PREFIX).isdigit() and _may_be_there(path / MANIFEST)
        if not committed_once:
            shutil.rmtree(path, ignore_errors=True)  # it costs space only, and the next attempt tries again


def _may_be_there(path: Path) -> bool:
    """False where it is not; a storage that does not say so has not lost it."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Pretty, sorted, and on the disk when it returns."""
    with path.open("w") as file:
        file.write(json.dumps(value, indent=1, sort_keys=True, allow_nan=False))
        file.flush()
        os.fsync(file.fileno())


def replace_json(path: Path, value: Any) -> None:
    """`write_json` for a record that is there already or will be: a reader, and a crash, find the old one or the new
    one, whole. One process at a time may write it."""
    temporary = path.with_name(path.name + ".tmp")
    write_json(temporary, value)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """`sha256:<hex>` of the contents."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            mark()
    return "sha256:" + digest.hexdigest()
