"""Run as a script: the operator's process with a wall clock of its own, which is ahead of the machine's by as many
seconds as a file says. The file is read at every look at the clock."""

from __future__ import annotations

import sys
import time
from pathlib import Path

_REAL = time.time


def main(offset: Path) -> int:
    """The clock is replaced before the operator is imported: its parts keep the function that they found."""
    time.time = lambda: _REAL() + float(offset.read_text())
    from posttrain_operator.__main__ import main as operator

    return operator()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
