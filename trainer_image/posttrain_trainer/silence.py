"""How long the quietest other node has been silent: said by the torchrun process of a node, read by its launcher.

The launcher asks once it was told to stop: to wait for a silent node would use up the grace period and save nothing. A
file between the two, because the launcher imports no torch and must get an answer also where torchrun is blocked.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Silence:
    """The node that has been silent for longest, and since when."""

    node: int
    seconds: float


def write(file: Path, seconds: Mapping[int, float]) -> None:
    """Seconds since each other node was last heard; whole or not at all. The file's own time is part of it."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(seconds))
    os.replace(temporary, file)


def longest(file: Path) -> Silence | None:
    """None where nothing is known: one node, not yet begun, or ended. A file that is written no more is a store that
    does not answer, and that is node 0's."""
    try:
        seconds = {int(node): float(since) for node, since in json.loads(file.read_text()).items()}
        age = time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return None
    node = max(seconds, key=lambda node: seconds[node])
    return Silence(0, age) if age > seconds[node] else Silence(node, seconds[node] + age)
