"""`python -m posttrain_trainer.elastic EXITS BEATS ARGUMENTS…`: torchrun, how each rank ended, who else breathes.

torchrun knows the exit codes and signals of its ranks and then ends with 1 whatever they were. This runs the very same
code and leaves what it knows in the file EXITS, and the silence of other nodes in BEATS, for the launcher that started
it.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from posttrain_trainer.linux import die_with_parent
from posttrain_trainer.peers import Beats
from posttrain_trainer.record import utc_now


def main(arguments: list[str]) -> int:
    """0 when every rank ended with 0, else 1."""
    die_with_parent()
    exits, file, *rest = arguments
    settings = parse_args(rest)
    beats = _beats(settings, Path(file))
    try:
        run(settings)
    except ChildFailedError as error:
        failures = {rank: failure.exitcode for rank, failure in error.failures.items()}
        Path(exits).write_text(json.dumps({"time": utc_now(), "ranks": failures}))
        return 1
    except SignalException:
        return 1  # the launcher sent the signal and knows
    finally:
        if beats is not None:
            beats.end()
    return 0


def _beats(settings: Namespace, file: Path) -> Beats | None:
    """None where there is one node."""
    if int(settings.nnodes) == 1:
        return None
    beats = Beats(settings.node_rank, int(settings.nnodes), (settings.master_addr, settings.master_port), file)
    beats.start()
    return beats


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
