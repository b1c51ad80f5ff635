"""`python -m posttrain_trainer.elastic EXITS ARGUMENTS…`: torchrun, and how each rank ended.

torchrun knows the exit codes and signals of its ranks and then ends with 1 whatever they were. This runs the very same
code and leaves what it knows in the file EXITS, for the launcher that started it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from posttrain_trainer.linux import die_with_parent
from posttrain_trainer.record import utc_now


def main(arguments: list[str]) -> int:
    """0 when every rank ended with 0, else 1."""
    die_with_parent()
    exits, *rest = arguments
    try:
        run(parse_args(rest))
    except ChildFailedError as error:
        failures = {rank: failure.exitcode for rank, failure in error.failures.items()}
        Path(exits).write_text(json.dumps({"time": utc_now(), "ranks": failures}))
        return 1
    except SignalException:
        return 1  # the launcher sent the signal and knows
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
