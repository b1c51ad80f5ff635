"""s3:// and gs:// sources to folders on the job's storage: listed once, downloaded once, then used as a claim is.

Called by fetch.py. What the listing said (names, sizes, times) is kept beside the files and is the source's revision:
an attempt that finds every file of it complete asks the store nothing. A file appears under its name only when it is
whole, so an attempt that was cut off goes on with the files that are missing.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs as pafs

from posttrain_api.places import Source
from posttrain_api.reasons import Reason
from posttrain_trainer.buckets import Bucket, Denied, Missing, buckets
from posttrain_trainer.data.readers import FORMATS
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.kinds import DENIED, NOT_FOUND, Kind, model_patterns
from posttrain_trainer.listings import LISTING, Item, Listing
from posttrain_trainer.nearest import SHOWN, names_sentence
from posttrain_trainer.progress import Progress

FILES = "files"
CHUNK = 8 * 2**20
AT_ONCE = 4

_log = logging.getLogger("posttrain.prepare")


@dataclass(frozen=True)
class Wanted:
    """A source, and which of its files are needed."""

    source: Source
    kind: Kind
    trust_remote_code: bool = False

    @property
    def path(self) -> str:
        """`bucket/key`, as the client writes it."""
        return self.source.uri.partition("://")[2].rstrip("/")

    @property
    def format(self) -> str:
        """Of a data source's files: Auto or a name of readers.FORMATS."""
        return getattr(self.source, "format", "Auto")

    def chosen(self, names: list[str]) -> list[str]:
        """The names to download, in order."""
        if self.kind == "model":
            patterns = model_patterns(names, self.trust_remote_code)
        else:
            patterns = [f"*{ending}" for ending, format in FORMATS.items() if self.format in ("Auto", format)]
            names = [name for name in names if not any(part.startswith((".", "_")) for part in name.split("/"))]
        return sorted(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))

    def folder(self, root: Path) -> Path:
        """Of this source's files: one for each URI and choice of files."""
        text = f"{self.kind} {self.trust_remote_code} {self.format} {self.source.uri}"
        return root / "objects" / hashlib.sha256(text.encode()).hexdigest()[:16]


def fetch(wanted: Wanted, root: Path) -> tuple[Path, str]:
    """The source's file or folder below `root`, and its revision.

    Model/DatasetNotFound with the nearest names; access denied as ModelAccessDenied or DatasetNotFound; StorageFull; a
    store that does not answer, and an object that changes while it is read, are a TrainerError that is tried again.
    """
    folder = wanted.folder(root)
    files = folder / FILES
    kept = Listing.read(folder / LISTING)
    if kept is not None and not kept.missing(files):
        return kept.place(files), kept.revision
    bucket, listing = _first_that_may(wanted)
    if kept is not None and kept != listing:
        _log.warning("%s changed since an attempt that was cut off: taking it as it is now", wanted.source.uri)
        _remove_changed(kept, listing, files)
    files.mkdir(parents=True, exist_ok=True)
    temporary = folder / (LISTING + ".tmp")
    temporary.write_text(listing.to_json())
    temporary.replace(folder / LISTING)
    _download_all(_Download(bucket, wanted, files, listing), listing.missing(files))
    return listing.place(files), listing.revision


def _remove_changed(kept: Listing, now: Listing, files: Path) -> None:
    same = set(now.items)
    for item in kept.items:
        if item not in same:
            (files / item.name).unlink(missing_ok=True)


def _first_that_may(wanted: Wanted) -> tuple[Bucket, Listing]:
    refusals: list[str] = []
    for bucket in buckets(wanted.source, wanted.kind):
        try:
            return bucket, _listing(wanted, bucket)
        except Denied as error:
            refusals.append(error.message)
    way = "a Secret with keys that may read it" if wanted.source.secret_path is None else "other keys"
    raise TrainerFailure(
        DENIED[wanted.kind],
        f"{wanted.source.uri}: access denied ({'; '.join(refusals)}). Let them read (and list) the bucket, or name "
        f"{way} in secretRef.",
    )


def _listing(wanted: Wanted, bucket: Bucket) -> Listing:
    # Listed first: a store says in a listing why it refuses, and to a question about one object only that it does.
    # Keys that may read one object and list nothing are enough for that object.
    try:
        found, refusal = _below(wanted, bucket), None
    except Denied as error:
        found, refusal = [], error
    chosen = wanted.chosen([item.name for item in found])
    if chosen:
        by_name = {item.name: item for item in found}
        return Listing(False, tuple(by_name[name] for name in chosen))
    if found:
        raise _nothing_usable(wanted, found)
    try:
        return Listing(True, (_object(wanted, bucket),))
    except TrainerFailure as error:
        raise refusal or error from error


def _below(wanted: Wanted, bucket: Bucket) -> list[Item]:
    with bucket.asked():
        found = bucket.files.get_file_info(pafs.FileSelector(wanted.path, recursive=True, allow_not_found=True))
    return [_item(info, wanted) for info in found if info.type == pafs.FileType.File]


def _object(wanted: Wanted, bucket: Bucket) -> Item:
    """The object that the URI names. ModelNotFound or DatasetNotFound where it names none."""
    with bucket.asked():
        info = bucket.files.get_file_info(wanted.path)
    if info.type == pafs.FileType.File and not wanted.source.uri.endswith("/"):
        return Item(PurePosixPath(wanted.path).name, info.size, info.mtime_ns)
    empty = info.type == pafs.FileType.Directory
    what = "there is no object below it. Correct the URI." if empty else _help(wanted, bucket)
    raise TrainerFailure(NOT_FOUND[wanted.kind], f"{wanted.source.uri}: {what}")


def _item(info: Any, wanted: Wanted) -> Item:
    """ModelNotFound or DatasetNotFound where the key would be a file outside of the source's folder."""
    name = info.path.removeprefix(wanted.path + "/")
    if not name or any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise TrainerFailure(
            NOT_FOUND[wanted.kind], f"{wanted.source.uri}: the key {info.path!r} cannot be a file's name. Rename it."
        )
    return Item(name, info.size, info.mtime_ns)


def _nothing_usable(wanted: Wanted, found: list[Item]) -> TrainerFailure:
    listed = ", ".join(item.name for item in found[:SHOWN]) + (", …" if len(found) > SHOWN else "")
    needed = "model file" if wanted.kind == "model" else f"data file ({', '.join(FORMATS)}; format {wanted.format})"
    return TrainerFailure(
        NOT_FOUND[wanted.kind], f"{wanted.source.uri}: no {needed} below it; it has: {listed}. Correct the URI."
    )


def _help(wanted: Wanted, bucket: Bucket) -> str:
    """What there is in place of the first part of the path that is missing. (Google's client lists no folders.)"""
    name, place = "", PurePosixPath(wanted.path)
    scheme = wanted.source.uri.partition("://")[0]
    while len(place.parts) > 1:
        name, place = place.name, place.parent
        try:
            names = sorted(_names(bucket, str(place)))
        except Missing:
            return f"there is no bucket {place.parts[0]!r} at {bucket.endpoint}. Correct the URI."
        except TrainerFailure as error:
            return f"there is no such object or folder, and {scheme}://{place} cannot be listed ({error.message})."
        if names:
            return f"there is no {name!r}. {names_sentence(f'{scheme}://{place}', name, names)}"
    return f"there is no {name!r} in the bucket {place.name!r}. Correct the URI."


def _names(bucket: Bucket, place: str) -> Iterable[str]:
    with bucket.asked():
        found = bucket.files.get_file_info(pafs.FileSelector(place, allow_not_found="/" in place))
    return [info.base_name for info in found]


@dataclass(frozen=True)
class _Download:
    """One source's transfer; `stop` ends the others when one has failed."""

    bucket: Bucket
    wanted: Wanted
    files: Path
    listing: Listing
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)

    def one(self, item: Item, progress: Progress) -> None:
        """Downloads it under another name, checks it, and gives it its own."""
        final = self.files / item.name
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(final.name + ".part")
        path = self.wanted.path if self.listing.single else f"{self.wanted.path}/{item.name}"
        before = self._tag(path)
        size = self._copy(path, partial, progress)
        if self.stop.is_set():
            return
        if size != item.size or before != self._tag(path):
            raise TrainerFailure(
                Reason.TRAINER_ERROR,
                f"{self.wanted.source.uri}: {item.name} changed while it was downloaded (listed with {item.size} "
                f"bytes, read {size}). It is tried again; let nobody write there meanwhile.",
            )
        partial.replace(final)

    def _tag(self, path: str) -> bytes | None:
        """What the store calls this content."""
        with self.bucket.asked(), self.bucket.files.open_input_file(path) as file:
            return {key.lower(): value for key, value in file.metadata().items()}.get(b"etag")

    def _copy(self, path: str, partial: Path, progress: Progress) -> int:
        size = 0
        with self.bucket.asked():
            source = self.bucket.files.open_input_stream(path)
        with source, partial.open("wb") as target:
            while not self.stop.is_set():
                with self.bucket.asked():
                    chunk = source.read(CHUNK)
                if not chunk:
                    break
                target.write(chunk)
                size += len(chunk)
                with self.lock:
                    progress.advance(len(chunk), f"at {partial.stem}")
            target.flush()
            os.fsync(target.fileno())
        return size


def _download_all(download: _Download, items: list[Item]) -> None:
    total = sum(item.size for item in items)
    _log.info("%s: downloading %d files, %d bytes", download.wanted.source.uri, len(items), total)
    with Progress("download", total) as progress, ThreadPoolExecutor(AT_ONCE) as pool:
        running = [pool.submit(download.one, item, progress) for item in items]
        try:
            for one in running:
                one.result()
        finally:
            download.stop.set()
            pool.shutdown(cancel_futures=True)
