"""The reference's log-probabilities, computed once before training and kept beside the prepared data.

Called by assemble. One file per token set, float32 [rows, arity], named by everything that its numbers depend on: what
another model, other data or another precision said is never found. All ranks compute their share, rank 0 writes; an
attempt after a restart finds the file. Nothing here may run once training has begun: the policy may be the model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from posttrain_trainer.batching import Share, whole_set
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.reference import REFERENCE, Reference, with_reference
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.tokenset import TokenSet

log = logging.getLogger(__name__)

VERSION = 1
"""Of the numbers' meaning."""


def key_of(facts: Mapping[str, object]) -> str:
    """32 hex digits over what the numbers depend on."""
    text = json.dumps({"version": VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Cached:
    """What was computed before training. values: float32 [rows, arity]."""

    values: NDArray[np.float32]

    def attach(self, micro: MicroBatch) -> MicroBatch:
        """A look at the file; the other ranks are not needed."""
        found = torch.from_numpy(np.array(self.values[list(micro.numbers)]).reshape(-1))
        return with_reference(micro, found.to(micro.ends.device))


@dataclass(frozen=True)
class Cache:
    """The files of one job. All ranks call its methods together."""

    key: str
    part: Share
    runtime: Runtime

    def open(self, folder: Path, tokens: TokenSet) -> Cached | None:
        """What is known of the token set in `folder`; None where nothing is, or not of all its rows."""
        path, shape = self._path(folder), (len(tokens), tokens.arity)
        whole = self.runtime.first and path.is_file() and _shape(path) == shape
        if not self.runtime.control.gather(whole)[0]:  # rank 0's word: the others may see the file later
            return None
        return Cached(np.load(path, mmap_mode="r"))

    def fill(self, folder: Path, tokens: TokenSet, reference: Reference) -> None:
        """Computes and writes it; writes nothing where the ranks agreed to stop."""
        rows: list[int] = []
        values: list[torch.Tensor] = []
        for cpu_micro in whole_set(tokens, self.part):
            if self.runtime.control.any(self.runtime.stop.requested):
                return
            micro = reference.attach(cpu_micro.to(self.runtime.device))
            if micro.tokens:  # not a dummy
                rows += micro.numbers
                values.append(micro.values[REFERENCE].cpu())
        mine = torch.cat(values).numpy() if values else np.empty(0, dtype=np.float32)
        parts = self.runtime.control.gather((np.array(rows, dtype=np.int64), mine))
        if self.runtime.first:
            whole = np.full((len(tokens), tokens.arity), np.nan, dtype=np.float32)
            for numbers, column in parts:
                whole[numbers] = column.reshape(-1, tokens.arity)
            _write(self._path(folder), whole)
            log.info("reference: log-probabilities of %d rows are in %s", len(tokens), self._path(folder))
        self.runtime.control.barrier()

    def _path(self, folder: Path) -> Path:
        return folder / f"reference-{self.key}.npy"


def _shape(path: Path) -> tuple[int, ...]:
    try:
        shape: tuple[int, ...] = np.load(path, mmap_mode="r").shape
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): it is computed anew", path, error)
        return ()
    return shape


def _write(path: Path, values: NDArray[np.float32]) -> None:
    """Temporary file, fsync, rename: a file that is there is whole."""
    # A name of its own: an attempt that was cut off may still be writing beside this one.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    with open(descriptor, "wb") as file:
        np.save(file, values)
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).rename(path)
