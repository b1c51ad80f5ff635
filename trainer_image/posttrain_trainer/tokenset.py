"""Token sets on storage: what `prepare` writes and every rank reads through memory maps.

A set is a sequence of examples in flat little-endian arrays, so host memory does not grow with the data. A row of it is
`arity` examples that belong together: one for language modelling, two (chosen, rejected) for pairs. Numbers that come
with a row, such as a margin, are one more flat array each.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHAPE = "set.json"
"""Arity and names of the number columns; written last, so that a set without it was never finished."""


@dataclass(frozen=True)
class Example:
    """One sequence. tokens int32 [T]; mask uint8 [T], 1 where tokens[t] is a counted target (so mask[0] is 0)."""

    tokens: NDArray[np.int32]
    mask: NDArray[np.uint8]


@dataclass(frozen=True)
class TrainingRow:
    """Examples that are trained on together, and the numbers that come with them."""

    examples: tuple[Example, ...]
    values: Mapping[str, float]


class TokenSet:
    """Read-only: tokens.bin int32, mask.bin uint8, offsets.bin int64 [sequences + 1], `<column>.f32` [rows]."""

    def __init__(self, folder: Path) -> None:
        """Opens memory maps. FileNotFoundError where the set is incomplete."""
        shape = json.loads((folder / SHAPE).read_text())
        self.arity: int = shape["arity"]
        self.offsets = _map(folder / "offsets.bin", "<i8")
        self._tokens = _map(folder / "tokens.bin", "<i4")
        self._mask = _map(folder / "mask.bin", "u1")
        self._values = {name: _map(folder / f"{name}.f32", "<f4") for name in shape["columns"]}

    def __len__(self) -> int:
        """Rows."""
        return (len(self.offsets) - 1) // self.arity

    def __getitem__(self, row: int) -> TrainingRow:
        first = row * self.arity
        examples = tuple(self._example(number) for number in range(first, first + self.arity))
        return TrainingRow(examples, {name: float(column[row]) for name, column in self._values.items()})

    def __iter__(self) -> Iterator[TrainingRow]:
        return (self[row] for row in range(len(self)))

    def lengths(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Tokens of each example of these rows (None: of all), int64 [rows, arity]."""
        chosen = np.arange(len(self)) if rows is None else rows
        bounds = np.asarray(self.offsets[(chosen * self.arity)[:, None] + np.arange(self.arity + 1)])
        return np.diff(bounds, axis=1)

    def _example(self, number: int) -> Example:
        start, stop = self.offsets[number], self.offsets[number + 1]
        return Example(self._tokens[start:stop], self._mask[start:stop])


def _map(path: Path, dtype: str) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class TokenSetWriter:
    """Appends rows; the set is complete when the context ends without an error."""

    def __init__(self, folder: Path, arity: int = 1, columns: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SHAPE).unlink(missing_ok=True)
        self._folder, self._arity = folder, arity
        self._tokens = (folder / "tokens.bin").open("wb")
        self._mask = (folder / "mask.bin").open("wb")
        self._offsets = array("q", [0])  # 8 bytes per example; a list would take five times that
        self._values = {name: array("f") for name in columns}

    def append(self, *examples: Example, **values: float) -> None:
        """One row. ValueError where it has not `arity` examples and every column's number, where tokens and mask
        differ in length, or where a first token is counted."""
        if len(examples) != self._arity or values.keys() != self._values.keys():
            raise ValueError(f"a row has {self._arity} examples and the numbers {sorted(self._values)}")
        for example in examples:
            self._write(example)
        for name, value in values.items():
            self._values[name].append(value)

    def _write(self, example: Example) -> None:
        if len(example.tokens) != len(example.mask) or (len(example.mask) and example.mask[0]):
            raise ValueError("tokens and mask must have one length, and the first token is never a target")
        self._tokens.write(np.asarray(example.tokens, dtype="<i4").tobytes())
        self._mask.write(np.asarray(example.mask, dtype="u1").tobytes())
        self._offsets.append(self._offsets[-1] + len(example.tokens))

    def __enter__(self) -> TokenSetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.close()
        self._mask.close()
        if kind is not None:
            return
        np.asarray(self._offsets, dtype="<i8").tofile(self._folder / "offsets.bin")
        for name, column in self._values.items():
            np.asarray(column, dtype="<f4").tofile(self._folder / f"{name}.f32")
        (self._folder / SHAPE).write_text(json.dumps({"arity": self._arity, "columns": list(self._values)}))


def set_files(folder: Path) -> list[str]:
    """Names of a finished set's files, in a fixed order."""
    shape = json.loads((folder / SHAPE).read_text())
    return [SHAPE, "offsets.bin", "tokens.bin", "mask.bin", *(f"{name}.f32" for name in shape["columns"])]
