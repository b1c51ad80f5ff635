"""The end record: what each rank leaves for the launcher, because torchrun itself always exits with 1.

A rank calls `write_end` once, as the last thing it does (`failed`, `preempted` and `succeeded` build the record),
then leaves with the record's exit code. The launcher of the same pod clears the files of its own ranks before a start
and reads them after. A rank without a file was ended from outside.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from posttrain_api.base import Model
from posttrain_api.reasons import Reason, exit_code_of
from posttrain_api.records import Success
from posttrain_trainer.errors import classify

ENV_ATTEMPT = "POSTTRAIN_ATTEMPT"
"""Number of the attempt, given to every rank: a checkpoint is committed only while attempt.json still has it."""
ENDS_DIR = "ends"
PREPARE = -1
"""The "rank" of prepare, which runs before there are any."""


class End(Model):
    """A rank's last word. `reason` None is success; `success` is set on rank 0 then. `time`: RFC 3339 in UTC."""

    rank: int
    reason: Reason | None = None
    message: str = ""
    step: int | None = None
    time: str
    exit_code: int = 0
    success: Success | None = None


def utc_now() -> str:
    """RFC 3339 in UTC with microseconds: the ends of ranks are put in order by it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def failed(rank: int, error: BaseException, step: int | None = None) -> End:
    """The end of a rank that an exception ended."""
    reason, message = classify(error)
    return End(rank=rank, reason=reason, message=message, step=step, time=utc_now(), exit_code=exit_code_of(reason))


def preempted(rank: int, message: str, step: int | None = None) -> End:
    """The end of a rank that SIGTERM ended, after the last save."""
    code = exit_code_of(Reason.PREEMPTED)
    return End(rank=rank, reason=Reason.PREEMPTED, message=message, step=step, time=utc_now(), exit_code=code)


def succeeded(rank: int, step: int, success: Success | None = None) -> End:
    """The end of a rank whose training is done; rank 0 gives the success record."""
    return End(rank=rank, step=step, time=utc_now(), success=success)


def write_end(work_dir: Path | str, end: End) -> None:
    """Writes `<work_dir>/ends/rank-<r>.json` whole or not at all. The first record of a rank holds, a later is
    dropped.
    """
    folder = Path(work_dir) / ENDS_DIR
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / _file_name(end.rank)
    if target.exists():
        return
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    temporary.write_text(end.to_json())
    temporary.replace(target)


def read_ends(work_dir: Path | str, ranks: Iterable[int]) -> dict[int, End]:
    """The records of these ranks, by rank; a rank without a readable record is left out."""
    found: dict[int, End] = {}
    for rank in ranks:
        try:
            text = (Path(work_dir) / ENDS_DIR / _file_name(rank)).read_text()
            found[rank] = End.model_validate_json(text)
        except (FileNotFoundError, ValidationError):
            continue
    return found


def clear_ends(work_dir: Path | str, ranks: Iterable[int]) -> None:
    """Removes what an earlier start of the same container left."""
    for rank in ranks:
        (Path(work_dir) / ENDS_DIR / _file_name(rank)).unlink(missing_ok=True)


def _file_name(rank: int) -> str:
    return "prepare.json" if rank == PREPARE else f"rank-{rank}.json"
