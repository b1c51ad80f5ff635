"""A prompt set: what a rollout answers, and the columns that its rewards are given.

`prepare` writes it as a token set with records (tokenset.py, data/columns.py); the collector reads it by row, on every
rank alike. Nothing of it stays in memory: ten million prompts cost what ten do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posttrain_trainer.tokenset import TokenSet


class PromptSet:
    """Read-only, by row."""

    def __init__(self, folder: Path) -> None:
        """Opens the files. FileNotFoundError where the set is incomplete; ValueError where it is none of prompts."""
        self._set = TokenSet(folder)
        if not self._set.recorded:
            raise ValueError(f"{folder}: the token set has no records, so it is none of prompts")

    def __len__(self) -> int:
        """Rows."""
        return len(self._set)

    @property
    def sources(self) -> tuple[int, ...]:
        """Rows of each source, in their order; they follow each other."""
        return self._set.sources

    def prompt(self, row: int) -> NDArray[np.int32]:
        """Tokens as the model sees them, int32 [p ≥ 1]."""
        return self._set[row].examples[0].tokens

    def columns(self, row: int) -> dict[str, Any]:
        """Every other column of the row, by the data's names."""
        columns: dict[str, Any] = json.loads(self._set[row].record or "{}")
        return columns
