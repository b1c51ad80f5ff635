"""Token sets on storage: what `prepare` writes and every rank reads by index.

A set is a sequence of examples in flat little-endian arrays. A row of it is `arity` examples that belong together: one
for language modelling, two (chosen, rejected) for pairs. Numbers that come with a row, such as a margin, are one more
flat array each; whatever else comes with it is a line of JSON, its record. Both sides hold a row at a time: host memory
does not grow with the data. Reading is by position, not through memory maps, whose pages would count as the process's
own until the kernel takes them back.
"""

from __future__ import annotations

import itertools
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure

SHAPE = "set.json"
"""Arity, names of the number columns, rows of each source, whether there are records; written last, so that a set
without it was never finished."""
RECORDS, RECORD_ENDS = "records.jsonl", "records.bin"
"""A line of JSON per row, and the byte behind each."""


@dataclass(frozen=True)
class Example:
    """One sequence. tokens int32 [T]; mask uint8 [T], 1 where tokens[t] is a counted target (so mask[0] is 0); each:
    numbers float32 of the counted tokens, by name, where an online step has them."""

    tokens: NDArray[np.int32]
    mask: NDArray[np.uint8]
    each: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingRow:
    """Examples that are trained on together, and the numbers that come with them. `record`: JSON of the row's other
    columns, of prompts only."""

    examples: tuple[Example, ...]
    values: Mapping[str, float]
    record: str | None = None


class _Flat:
    """A flat array in a file, read by position. It may be read from several threads and after a fork."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._path = path
        self._dtype = np.dtype(dtype)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.size = os.fstat(self._file).st_size // self._dtype.itemsize

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Elements [start, stop), read-only. TrainerFailure where the file ends before."""
        width = self._dtype.itemsize
        parts, left = [], (stop - start) * width
        while left:
            part = os.pread(self._file, left, stop * width - left)
            if not part:
                raise TrainerFailure(
                    Reason.DATASET_NOT_FOUND,
                    f"{self._path}: {left} bytes are missing at its end. Remove the prepared folder and run the job "
                    "anew.",
                )
            parts.append(part)
            left -= len(part)
        return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), dtype=self._dtype)


class TokenSet:
    """Read-only: tokens.bin int32, mask.bin uint8, offsets.bin int64 [sequences + 1], `<column>.f32` [rows]; with
    records: records.jsonl, records.bin int64 [rows + 1]."""

    def __init__(self, folder: Path) -> None:
        """Opens the files. FileNotFoundError where the set is incomplete."""
        shape = json.loads((folder / SHAPE).read_text())
        self.arity: int = shape["arity"]
        self._offsets = _Flat(folder / "offsets.bin", "<i8")
        self._tokens = _Flat(folder / "tokens.bin", "<i4")
        self._mask = _Flat(folder / "mask.bin", "u1")
        self._values = {name: _Flat(folder / f"{name}.f32", "<f4") for name in shape["columns"]}
        names = (RECORDS, RECORD_ENDS) if shape.get("records") else ()
        self._records = tuple(_Flat(folder / name, kind) for name, kind in zip(names, ("u1", "<i8"), strict=False))
        self.sources: tuple[int, ...] = tuple(shape.get("sources", [len(self)]))
        """Rows of each source, in their order; they follow each other."""

    def __len__(self) -> int:
        """Rows."""
        return (self._offsets.size - 1) // self.arity

    def __getitem__(self, row: int) -> TrainingRow:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        bounds = self._bounds(row, row + 1)
        begin, end = int(bounds[0]), int(bounds[-1])
        tokens, mask, cuts = self._tokens.read(begin, end), self._mask.read(begin, end), bounds - begin
        examples = (Example(tokens[a:b], mask[a:b]) for a, b in itertools.pairwise(cuts))
        values = {name: float(column.read(row, row + 1)[0]) for name, column in self._values.items()}
        return TrainingRow(tuple(examples), values, self._record(row))

    @property
    def recorded(self) -> bool:
        """Whether each row has a record."""
        return bool(self._records)

    def __iter__(self) -> Iterator[TrainingRow]:
        return (self[row] for row in range(len(self)))

    def lengths(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Tokens of each example of these rows (None: of all), int64 [rows, arity]."""
        if rows is None:
            return np.diff(self._bounds(0, len(self))).reshape(-1, self.arity)
        if not len(rows):
            return np.empty((0, self.arity), dtype=np.int64)
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows) and (np.diff(rows) == 1).all():
            return np.diff(self._bounds(first, last + 1)).reshape(-1, self.arity)
        return np.stack([np.diff(self._bounds(row, row + 1)) for row in rows.tolist()])

    def _record(self, row: int) -> str | None:
        if not self._records:
            return None
        lines, ends = self._records
        begin, end = ends.read(row, row + 2).tolist()
        return lines.read(begin, end - 1).tobytes().decode()

    def _bounds(self, first: int, last: int) -> NDArray[np.int64]:
        return self._offsets.read(first * self.arity, last * self.arity + 1)


class TokenSetWriter:
    """Appends rows; the set is complete when the context ends without an error. `records`: every row has one."""

    def __init__(self, folder: Path, arity: int = 1, columns: Sequence[str] = (), *, records: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SHAPE).unlink(missing_ok=True)
        self._folder, self._arity = folder, arity
        self._tokens, self._mask, self._offsets = (_create(folder / f"{name}.bin") for name in FLAT)
        self._values = {name: _create(folder / f"{name}.f32") for name in columns}
        self._records = tuple(_create(folder / name) for name in (RECORDS, RECORD_ENDS) if records)
        self._written, self._rows, self._recorded = 0, 0, 0
        self.sources: list[int] = []
        """Rows of each source so far."""
        self._write_offset()
        self._write_record("")

    def append(self, *examples: Example, record: str | None = None, **values: float) -> None:
        """One row. ValueError where it has not `arity` examples, every column's number and a record where the set has
        them, where tokens and mask differ in length, or where a first token is counted."""
        if len(examples) != self._arity or values.keys() != self._values.keys():
            raise ValueError(f"a row has {self._arity} examples and the numbers {sorted(self._values)}")
        if (record is not None) != bool(self._records):
            raise ValueError("either every row of a set has a record or none")
        for example in examples:
            self._write(example)
        for name, value in values.items():
            self._values[name].write(np.array(value, dtype="<f4").tobytes())
        if record is not None:
            self._write_record(record + "\n")
        self._rows += 1

    def end_source(self) -> None:
        """The rows since the last call, or since the beginning, are those of one source."""
        self.sources.append(self._rows - sum(self.sources))

    def _write(self, example: Example) -> None:
        if len(example.tokens) != len(example.mask) or (len(example.mask) and example.mask[0]):
            raise ValueError("tokens and mask must have one length, and the first token is never a target")
        self._tokens.write(np.asarray(example.tokens, dtype="<i4").tobytes())
        self._mask.write(np.asarray(example.mask, dtype="u1").tobytes())
        self._written += len(example.tokens)
        self._write_offset()

    def _write_offset(self) -> None:
        self._offsets.write(self._written.to_bytes(8, "little"))

    def _write_record(self, line: str) -> None:
        if not self._records:
            return
        lines, ends = self._records
        self._recorded += lines.write(line.encode())
        ends.write(self._recorded.to_bytes(8, "little"))

    def __enter__(self) -> TokenSetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._tokens, self._mask, self._offsets, *self._values.values(), *self._records):
            file.close()
        if kind is not None:
            return
        if self._rows > sum(self.sources) or not self.sources:
            self.end_source()
        shape = {"arity": self._arity, "columns": list(self._values), "sources": self.sources}
        if self._records:
            shape["records"] = True
        (self._folder / SHAPE).write_text(json.dumps(shape))


FLAT = ("tokens", "mask", "offsets")


def _create(path: Path) -> BinaryIO:
    return path.open("wb")


def set_files(folder: Path) -> list[str]:
    """Names of a finished set's files, in a fixed order."""
    shape = json.loads((folder / SHAPE).read_text())
    records = (RECORDS, RECORD_ENDS) if shape.get("records") else ()
    return [SHAPE, "offsets.bin", "tokens.bin", "mask.bin", *(f"{name}.f32" for name in shape["columns"]), *records]
