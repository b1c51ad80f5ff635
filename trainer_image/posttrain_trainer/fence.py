"""One attempt at a time: whoever is not the newest attempt writes nothing more.

A node that was cut off may go on training while its successor runs on the same storage. The launcher of a new
attempt writes its number to attempt.json; rank 0 looks there before each commit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from posttrain_api.names import ATTEMPT_FILE
from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure


@dataclass(frozen=True)
class Fence:
    """`attempt`: the number of this attempt, from POSTTRAIN_ATTEMPT."""

    run_dir: Path
    attempt: int

    def check(self) -> None:
        """TrainerFailure where a newer attempt has taken over. No file, or an older number: nobody has."""
        newest = current_attempt(self.run_dir)
        if newest is not None and newest > self.attempt:
            raise TrainerFailure(
                Reason.PEER_LOST,
                f"{self.run_dir / ATTEMPT_FILE}: attempt {newest} has taken over, "
                f"this is attempt {self.attempt}: it writes nothing more.",
            )


def current_attempt(run_dir: Path) -> int | None:
    """The number in attempt.json; None where there is no such file."""
    try:
        return int(json.loads((run_dir / ATTEMPT_FILE).read_text())["attempt"])
    except FileNotFoundError:
        return None
