"""Rows out of files, one at a time, each with its place.

JSONL, Parquet and Arrow files, and folders of them in sorted order. Files are streamed: host memory does not grow
with the data. A line that is no JSON object comes out as a `Broken` with its place, and the caller's policy decides;
a file that cannot be read at all is a `TrainerFailure`.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure, printable, readable
from posttrain_trainer.nearest import nearest_names

FORMATS = {
    ".jsonl": "JSONL",
    ".ndjson": "JSONL",
    ".json": "JSONL",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}
BATCH_ROWS = 256


@dataclass(frozen=True)
class Place:
    """Where a row is, as a user finds it: `train.jsonl line 17`, `part-0.parquet row 3` (both from 1)."""

    file: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.number}"


@dataclass(frozen=True)
class Row:
    """One row as read: column → value. `size`: about how many bytes of the file it stands for."""

    place: Place
    values: dict[str, Any]
    size: int = 0


@dataclass(frozen=True)
class Broken:
    """A place that holds no row; `reason` is what it is counted under."""

    place: Place
    reason: str
    detail: str
    size: int = 0


@dataclass(frozen=True)
class DataFile:
    """One file: where it is, how it is called in messages, and its format."""

    path: Path
    name: str
    format: str


def list_files(path: Path, uri: str, wanted: str = "Auto") -> list[DataFile]:
    """The files of a source in sorted order.

    DatasetNotFound where `path` does not exist or is a folder without data; DatasetSchemaInvalid where a single file's
    format is unknown. Hidden files and folders are passed over.
    """
    if path.is_file():
        return [DataFile(path, printable(path.name), _format(path, uri, wanted))]
    if not path.is_dir():
        raise TrainerFailure(Reason.DATASET_NOT_FOUND, f"{uri}: {path} does not exist. {nearest_names(path)}")
    found = [file for file in _below(path) if not _hidden(file.relative_to(path))]
    files = [file for file in found if file.suffix in FORMATS and (wanted in ("Auto", FORMATS[file.suffix]))]
    if not files:
        kinds = ", ".join(FORMATS)
        listed = ", ".join(str(file.relative_to(path)) for file in found[:5]) or "nothing"
        raise TrainerFailure(
            Reason.DATASET_NOT_FOUND,
            f"{uri}: no data file ({kinds}; format {wanted}) in the folder {path}; it has: {listed}. Correct the path.",
        )
    return [DataFile(file, printable(str(file.relative_to(path))), FORMATS[file.suffix]) for file in files]


def read(file: DataFile) -> Iterator[Row | Broken]:
    """The rows of one file in their order. DatasetNotFound where it is gone since it was listed."""
    readers = {"JSONL": _read_jsonl, "Parquet": _read_parquet, "Arrow": _read_arrow}
    try:
        with readable(Reason.DATASET_NOT_FOUND, file.name, file.path):
            yield from readers[file.format](file)
    except FileNotFoundError as error:
        raise TrainerFailure(
            Reason.DATASET_NOT_FOUND,
            f"{file.name}: {file.path} was listed and is gone. Put it back and run the job anew; leave data as they "
            "are while a job prepares.",
        ) from error


def _below(folder: Path) -> list[Path]:
    """Every file, sorted. PermissionError for a folder that may not be listed: Path.rglob would pass over it."""

    def fail(error: OSError) -> None:
        raise error

    return sorted(Path(where) / name for where, _, names in os.walk(folder, onerror=fail) for name in names)


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _format(path: Path, uri: str, wanted: str) -> str:
    if wanted != "Auto":
        return wanted
    if path.suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise TrainerFailure(
            Reason.DATASET_SCHEMA_INVALID,
            f"{uri}: the ending {path.suffix!r} says no format (known: {known}). Rename the file or set data's format.",
        )
    return FORMATS[path.suffix]


def _read_jsonl(file: DataFile) -> Iterator[Row | Broken]:
    with file.path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                _refuse_array(file, line)
            if line.strip():
                yield _parse_line(line, Place(file.name, "line", number))


def _refuse_array(file: DataFile, line: bytes) -> None:
    if line.lstrip().startswith(b"["):
        raise TrainerFailure(
            Reason.DATASET_SCHEMA_INVALID,
            f"{file.name} line 1: a JSON array; JSONL has one object per line. Convert it, for example: jq -c '.[]'",
        )


def _parse_line(line: bytes, place: Place) -> Row | Broken:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return Broken(place, "BrokenJSON", f"not UTF-8 at byte {error.start + 1}", len(line))
    except json.JSONDecodeError as error:
        return Broken(place, "BrokenJSON", f"broken JSON: {error.msg} at column {error.colno}", len(line))
    except RecursionError:
        return Broken(place, "BrokenJSON", "broken JSON: nested too deeply", len(line))
    except ValueError as error:  # a number with thousands of digits
        return Broken(place, "BrokenJSON", f"broken JSON: {error}", len(line))
    if not isinstance(value, dict):
        return Broken(place, "NotAnObject", f"a JSON {type(value).__name__}, not an object", len(line))
    return Row(place, value, len(line))


def _read_parquet(file: DataFile) -> Iterator[Row | Broken]:
    with _readable(file):
        # Read, not mapped, and one row group after the other: pages of a map and what is decoded ahead would stay.
        table = pq.ParquetFile(file.path, memory_map=False, pre_buffer=False)
        size = file.path.stat().st_size // max(1, table.metadata.num_rows)
        groups = (
            table.iter_batches(BATCH_ROWS, row_groups=[i], use_threads=False) for i in range(table.num_row_groups)
        )
        batches = itertools.chain.from_iterable(groups)
        yield from _rows_of(file, batches, size)


def _read_arrow(file: DataFile) -> Iterator[Row | Broken]:
    """Both of Arrow's framings: the file format and the stream that `datasets` writes."""
    with _readable(file), pa.memory_map(str(file.path)) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            source.seek(0)
            batches = iter(pa.ipc.open_stream(source))
        yield from _rows_of(file, batches, 0)


def _rows_of(file: DataFile, batches: Iterator[pa.RecordBatch], size: int) -> Iterator[Row | Broken]:
    number = 0
    for batch in batches:
        # A batch of an Arrow file may hold the whole file: only slices become Python objects.
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for values in _values(batch.slice(start, BATCH_ROWS)):
                number += 1
                place = Place(file.name, "row", number)
                if isinstance(values, UnicodeDecodeError):
                    yield Broken(place, "NotUnicode", f"a string is not UTF-8: {values.reason}", size)
                else:
                    yield Row(place, values, size)


def _values(batch: pa.RecordBatch) -> list[dict[str, Any] | UnicodeDecodeError]:
    """The rows; the error instead of one with a string that is no UTF-8 (Arrow does not look into strings)."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        return [value for row in range(batch.num_rows) for value in _values(batch.slice(row, 1))]


@contextmanager
def _readable(file: DataFile) -> Iterator[None]:
    """DatasetSchemaInvalid where the file is torn or no such file. What the system cannot read (an error number) may
    be tried again, and so may a want of memory."""
    try:
        yield
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise TrainerFailure(
            Reason.DATASET_SCHEMA_INVALID, f"{file.name}: not a readable {file.format} file: {error}. Write it again."
        ) from error
