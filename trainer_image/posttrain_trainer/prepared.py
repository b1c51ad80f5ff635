"""What `prepare` leaves on storage for `train`: the manifest and the token sets.

`prepare` (one process, before any rank starts) writes them, every rank reads them, and nothing else passes between the
two. The manifest is written last: a folder without it was never finished. Token sets are flat arrays read through
memory maps, so host memory does not grow with the data.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain_api.base import Model
from posttrain_api.records import DataReport, Resolved

MANIFEST = "manifest.json"


class Prepared(Model):
    """The manifest. Folders are absolute paths; `config_digest` is that of the TrainerConfig it was made for."""

    config_digest: str
    model_dir: str
    """Folder with config.json and weights; for a scratch model config.json only: weights come from the seed."""
    model_digest: str
    """Over names and contents of config and weight files: a checkpoint of another model is refused by it."""
    tokenizer_dir: str
    train_dir: str
    eval_dir: str | None = None
    data_digest: str
    """Over the token sets: a checkpoint made on other data is refused by it."""
    data_report: DataReport
    eval_report: DataReport | None = None
    resolved: Resolved


def write_manifest(folder: Path, prepared: Prepared) -> None:
    """Commits: temporary file, fsync, rename."""
    temporary = folder / (MANIFEST + ".tmp")
    with temporary.open("w") as file:
        file.write(json.dumps(prepared.to_wire(), indent=1, sort_keys=True))
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / MANIFEST)


def read_manifest(folder: Path) -> Prepared | None:
    """The committed manifest, None where there is none yet. ValueError where it is not one of ours."""
    try:
        text = (folder / MANIFEST).read_text()
    except FileNotFoundError:
        return None
    return Prepared.model_validate_json(text)


@dataclass(frozen=True)
class Example:
    """One sequence. tokens int32 [T]; mask uint8 [T], 1 where tokens[t] is a counted target (so mask[0] is 0)."""

    tokens: NDArray[np.int32]
    mask: NDArray[np.uint8]


class TokenSet:
    """A read-only set of examples, little-endian: tokens.bin int32, mask.bin uint8, offsets.bin int64 [n + 1]."""

    def __init__(self, folder: Path) -> None:
        """Opens memory maps. FileNotFoundError where the set is incomplete."""
        self.offsets = np.fromfile(folder / "offsets.bin", dtype="<i8")
        self._tokens = _map(folder / "tokens.bin", "<i4")
        self._mask = _map(folder / "mask.bin", "u1")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        start, stop = self.offsets[index], self.offsets[index + 1]
        return Example(self._tokens[start:stop], self._mask[start:stop])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, int64 [n]."""
        return np.diff(self.offsets)


def _map(path: Path, dtype: str) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class TokenSetWriter:
    """Appends examples; the set is complete when the context ends without an error."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._tokens = (folder / "tokens.bin").open("wb")
        self._mask = (folder / "mask.bin").open("wb")
        self._offsets = array("q", [0])  # 8 bytes per example; a list would take five times that

    def append(self, example: Example) -> None:
        """ValueError where tokens and mask differ in length or the first token is counted."""
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
        if kind is None:
            np.asarray(self._offsets, dtype="<i8").tofile(self._folder / "offsets.bin")
