"""The files that a job's data had at its first attempt, so that one that is gone at a later attempt is named.

Called by `prepare` once all sources are listed. A later attempt that must prepare anew would otherwise train on what is
left of a folder and not say so. Prepared data are used as they are and need no files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from posttrain_api.reasons import Reason
from posttrain_trainer.checkpoint_files import replace_json
from posttrain_trainer.errors import TrainerFailure

SHOWN = 5


def check(record: Path, listed: Mapping[str, Sequence[str]]) -> None:
    """Compares {source: names of its files} with the record, which is written where there is none. DatasetNotFound
    with the names of files that are gone."""
    known: dict[str, list[str]] = json.loads(record.read_text()) if record.is_file() else {}
    for source, names in listed.items():
        gone = sorted(set(known.get(source, ())) - set(names))
        if gone:
            more = f" and {len(gone) - SHOWN} more" if len(gone) > SHOWN else ""
            raise TrainerFailure(
                Reason.DATASET_NOT_FOUND,
                f"{source}: {', '.join(gone[:SHOWN])}{more} was there at the first attempt of this job and is gone. "
                "Put it back and run the job anew, or create a new job for what is left.",
            )
    replace_json(record, {**known, **{source: list(names) for source, names in listed.items()}})
