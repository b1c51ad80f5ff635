"""Which checkpoint a job goes on with: the newest whole one, and never none where one was committed once.

Used by checkpoint.py. All ranks ask together and get one answer: rank 0 lists, each rank reads its share of the files.
What is refused on the way is said, in the log and to the outside, because somebody should look at that storage.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from posttrain_api.names import CHECKPOINTS_DIR, COMMITTED_FILE
from posttrain_api.reasons import Reason
from posttrain_trainer import checkpoint_files as files
from posttrain_trainer.checkpoint_files import Committed
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.runtime import Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where checkpoints are. `uri`: the run's, as the outside names it; `start_from`: folder of another job's;
    `staging`: of the node, where they are written first."""

    run_dir: Path
    uri: str
    keep: int
    resume: bool
    start_from: Path | None = None
    staging: Path | None = None

    @property
    def root(self) -> Path:
        """The folder of checkpoint folders."""
        return self.run_dir / CHECKPOINTS_DIR

    @property
    def record(self) -> Path:
        """What was committed last; outside the folder, so that it tells of one that was removed."""
        return self.run_dir / COMMITTED_FILE


@dataclass(frozen=True)
class Choice:
    """What is resumed (None: nothing was ever committed), and why newer ones were not."""

    chosen: Committed | None
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Listed:
    """What rank 0 sees: newest first; newer ones that were committed and are not there; or why there is none."""

    candidates: tuple[Committed, ...] = ()
    lost: tuple[str, ...] = ()
    failure: str | None = None


class Chooser:
    """Looks at the checkpoints of a place. All ranks call every method together."""

    def __init__(self, place: Place, runtime: Runtime) -> None:
        self._place, self._control = place, runtime.control
        self._rank, self._ranks = runtime.rank, runtime.ranks

    def choose(self) -> Choice:
        """The newest whole one among the job's own, else among `start_from`'s. TrainerFailure(CheckpointIncompatible)
        where there were some and none is whole."""
        # Rank 0's list counts, whatever another node sees of the storage; and where there is none, all of them end.
        listed: _Listed = self._control.gather(self._listed())[0]
        if listed.failure is not None:
            raise TrainerFailure(Reason.CHECKPOINT_INCOMPATIBLE, listed.failure)
        refused = list(listed.lost)
        for loss in refused:
            log.warning("checkpoint not usable: %s", loss)
        for candidate in listed.candidates:
            problem = self.damage(candidate)
            if problem is None:
                return Choice(candidate, tuple(refused))
            log.warning("checkpoint not usable: %s", problem)
            refused.append(problem)
        if listed.candidates:
            raise TrainerFailure(
                Reason.CHECKPOINT_INCOMPATIBLE,
                f"No checkpoint is whole: {'; '.join(refused)}. Restore the files, "
                "or run the job anew under another name.",
            )
        return Choice(None)

    def damage(self, candidate: Committed) -> str | None:
        """The first damage of its files, as all ranks together find it."""
        names = sorted(candidate.manifest.files)[self._rank :: self._ranks]
        found: list[str | None] = self._control.gather(files.damaged(candidate, names))
        return next((problem for problem in found if problem is not None), None)

    def problem(self, step: int) -> str | None:
        """Why the job's own checkpoint of a step cannot be used; None where it is whole. OSError, on all ranks, where
        the storage cannot say now."""
        folder = files.folder_of(self._place.root, step)
        seen: Committed | OSError | None = self._control.gather(_seen(folder) if self._rank == 0 else None)[0]
        if isinstance(seen, OSError):
            raise seen
        return f"{folder}: it is not committed" if seen is None else self.damage(seen)

    def newest(self) -> Committed | None:
        """The job's own newest committed one, whole or not."""
        own = files.committed(self._place.root) if self._rank == 0 else []
        newest: Committed | None = self._control.gather(own[0] if own else None)[0]
        return newest

    def _listed(self) -> _Listed:
        if self._rank != 0:
            return _Listed()
        own = _found(self._place.root) if self._place.resume else []
        # Steps that were reported as saved are not done again in silence.
        step = committed_step(self._place.record) if self._place.resume else None
        if own:
            lost = step is not None and step > own[0].manifest.step
            return _Listed(tuple(own), (_loss(files.folder_of(self._place.root, step or 0)),) if lost else ())
        if step is not None:
            return _Listed(
                failure=f"{self._place.root}: step {step} was committed there, and no checkpoint is left that has its "
                f"{files.MANIFEST}. Restore the folder; or, to begin anew, run the job under another name."
            )
        return _Listed() if self._place.start_from is None else _others(self._place.start_from)


def _found(root: Path) -> list[Committed]:
    """What can be read; OSError where that is nothing because the storage cannot read now."""
    return files.committed(root) or files.all_committed(root)


def _seen(folder: Path) -> Committed | OSError | None:
    try:
        return files.read_committed(folder)
    except OSError as error:
        return error


def _loss(folder: Path) -> str:
    """Why a checkpoint that was committed is not among those that are there."""
    try:
        files.read_committed(folder)
    except OSError as error:
        return f"{folder}: its {files.MANIFEST} cannot be read: {error.strerror}"
    return f"{folder}: its {files.MANIFEST} is lost"


def _others(folder: Path) -> _Listed:
    single = files.read_committed(folder)
    good = files.good_step(folder)
    all_of_them = (each for each in _found(folder) if good is None or each.manifest.step <= good)
    found = (single,) if single is not None else tuple(all_of_them)
    if found:
        return _Listed(found)
    return _Listed(
        failure=f"spec.checkpoint.from: {folder} holds no committed checkpoint (a folder with {files.MANIFEST}). "
        "Give the URI that status.checkpoints.last of the other job shows."
    )


def committed_step(record: Path) -> int | None:
    """The step of the newest commit that was recorded; None where there is no record."""
    try:
        return int(json.loads(record.read_text())["step"])
    except FileNotFoundError:
        return None
