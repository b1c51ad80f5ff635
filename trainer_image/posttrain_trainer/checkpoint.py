"""Saving and resuming: everything a later attempt needs to go on bit for bit.

Called by the worker (resume) and the loop (save). All ranks call every method together. A committed checkpoint that
cannot be used ends the job with CheckpointIncompatible; only where none was ever committed is a fresh start right.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from posttrain_api.reasons import Reason
from posttrain_api.records import Best, Checkpoint
from posttrain_trainer import checkpoint_files as files
from posttrain_trainer.checkpoint_facts import Facts, differences
from posttrain_trainer.checkpoint_files import Committed, Manifest
from posttrain_trainer.errors import TrainerFailure, classify
from posttrain_trainer.fence import Fence
from posttrain_trainer.metrics import finite
from posttrain_trainer.record import utc_now
from posttrain_trainer.runtime import Runtime

STATE = "trainer.json"
log = logging.getLogger(__name__)


class Saved(Protocol):
    """What has weights and optimizer states of its own: an engine, or several (roles.py)."""

    def save(self, folder: Path) -> None:
        """Writes its files below `folder`; all ranks call it."""

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote; all ranks call it. TrainerFailure(CheckpointIncompatible)."""


@dataclass(frozen=True)
class OnlineState:
    """What stage RL carries from step to step. `cursor`: prompts that were taken so far, those of refills too;
    `kl_coefficient`: PPO's, which adapts."""

    cursor: int
    kl_coefficient: float


@dataclass(frozen=True)
class State:
    """What the loop counts. `metrics`: the last step's, for the success record of a job that only has to export;
    `best`: the best evaluation so far, whose checkpoint is kept; `online`: of stage RL."""

    step: int = 0
    tokens: int = 0
    metrics: dict[str, float] | None = None
    best: Best | None = None
    online: OnlineState | None = None

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON. A metric that is no number is left out: an evaluation that gave one is repeated on resume."""
        metrics = None if self.metrics is None else finite(self.metrics)
        best = None if self.best is None else self.best.to_wire()
        online = None if self.online is None else vars(self.online)
        return {"step": self.step, "tokens": self.tokens, "metrics": metrics, "best": best, "online": online}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> State:
        """What `to_wire` gave, of a release without `best` or `online` too."""
        best, online = wire.get("best"), wire.get("online")
        objects = {
            "best": None if best is None else Best.model_validate(best),
            "online": None if online is None else OnlineState(**online),
        }
        return cls(**{**wire, **objects})


@dataclass(frozen=True)
class Place:
    """Where checkpoints are. `uri`: the run's, as the outside names it; `start_from`: folder of another job's."""

    run_dir: Path
    uri: str
    keep: int
    resume: bool
    start_from: Path | None = None

    @property
    def root(self) -> Path:
        """The folder of checkpoint folders."""
        return self.run_dir / "checkpoints"


class Checkpoints:
    """The checkpoints of one run. `last`: the newest that this attempt resumed from or committed."""

    def __init__(self, place: Place, runtime: Runtime, facts: Facts, fence: Fence) -> None:
        self.last: Checkpoint | None = None
        self.fence = fence
        self._place = place
        self._runtime = runtime
        self._facts = facts

    def resume(self, saved: Saved) -> State:
        """Loads the newest whole checkpoint; State() for a fresh start. TrainerFailure(CheckpointIncompatible)."""
        self._prepare_root()
        chosen = self._choose()
        if chosen is None:
            return State()
        own = chosen.folder.parent == self._place.root
        state = self._with_its_best(self._check(chosen, own))
        saved.load(chosen.folder)
        restore_random(torch.load(chosen.folder / _random_name(self._runtime.rank), weights_only=True))
        log.info("resumed from %s at step %d", chosen.folder, state.step)
        if own:
            self.last = self._describe(chosen)
        return state

    def load(self, saved: Saved, step: int) -> None:
        """The weights of an own checkpoint. TrainerFailure(CheckpointIncompatible) where it is not whole."""
        problem = self._problem(step)
        if problem is not None:
            raise TrainerFailure(
                Reason.CHECKPOINT_INCOMPATIBLE,
                f"The best checkpoint cannot be exported: {problem}. The output is whole. Restore the file and run the "
                "job anew, or switch evaluation.keepBest off.",
            )
        saved.load(files.folder_of(self._place.root, step))

    def save(self, saved: Saved, state: State, random_state: dict[str, Any]) -> Checkpoint:
        """Commits a checkpoint of `state` and removes the oldest. TrainerFailure(StorageFull) leaves the older ones
        whole."""
        temporary = files.temporary_of(self._place.root, state.step, self.fence.attempt)
        try:
            committed = self._write(temporary, saved, state, random_state)
        except Exception as error:
            full = _storage_full(error, self._place.root)
            shutil.rmtree(temporary, ignore_errors=True)  # best effort: the error itself is what matters
            if full is not None:
                raise full from error
            raise
        # Rank 0 tells the others: a rename on a network file system may show late on another node.
        last: Checkpoint = self._runtime.control.gather(self._describe(committed) if committed else None)[0]
        self.last = last
        return last

    def _write(self, temporary: Path, saved: Saved, state: State, random_state: dict[str, Any]) -> Committed | None:
        """The committed checkpoint on rank 0, None on the others."""
        runtime = self._runtime
        if runtime.first:
            self.fence.check()
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            document = {"state": state.to_wire(), "facts": vars(self._facts)}
            files.write_json(temporary / STATE, document)
        runtime.control.barrier()
        torch.save(random_state, temporary / _random_name(runtime.rank))
        saved.save(temporary)
        runtime.control.barrier()
        mine = files.files_below(temporary)[runtime.rank :: runtime.ranks]
        parts = runtime.control.gather(files.entries(temporary, mine))
        if not runtime.first:
            return None
        listed = {name: entry for part in parts for name, entry in part.items()}
        manifest = Manifest(step=state.step, time=utc_now(), attempt=self.fence.attempt, files=listed)
        final = files.folder_of(self._place.root, state.step)
        self.fence.check()
        files.commit(temporary, final, manifest)
        files.prune(self._place.root, self._place.keep, None if state.best is None else state.best.step)
        return Committed(final, manifest)

    def _prepare_root(self) -> None:
        if self._runtime.first:
            self.fence.check()
            self._place.root.mkdir(parents=True, exist_ok=True)
            files.remove_unfinished(self._place.root)
        self._runtime.control.barrier()

    def _choose(self) -> Committed | None:
        """The newest whole one among the job's own, else among `start_from`'s. All ranks look at rank 0's list."""
        candidates: list[Committed] = self._runtime.control.gather(self._candidates())[0]
        problems = []
        for candidate in candidates:
            problem = self._damage(candidate)
            if problem is None:
                return candidate
            log.warning("checkpoint not usable: %s", problem)
            problems.append(problem)
        if not problems:
            return None
        raise TrainerFailure(
            Reason.CHECKPOINT_INCOMPATIBLE,
            f"No checkpoint is whole: {'; '.join(problems)}. Restore the files, "
            "or run the job anew under another name.",
        )

    def _candidates(self) -> list[Committed]:
        own = files.committed(self._place.root) if self._place.resume else []
        folder = self._place.start_from
        if own or folder is None:
            return own
        single = files.read_committed(folder)
        other = [single] if single is not None else files.committed(folder)
        if not other:
            raise TrainerFailure(
                Reason.CHECKPOINT_INCOMPATIBLE,
                f"spec.checkpoint.from: {folder} holds no committed checkpoint (a folder with {files.MANIFEST}). "
                "Give the URI that status.checkpoints.last of the other job shows.",
            )
        return other

    def _damage(self, candidate: Committed) -> str | None:
        names = sorted(candidate.manifest.files)[self._runtime.rank :: self._runtime.ranks]
        found: list[str | None] = self._runtime.control.gather(files.damaged(candidate, names))
        return next((problem for problem in found if problem is not None), None)

    def _check(self, chosen: Committed, own: bool) -> State:
        document = json.loads((chosen.folder / STATE).read_text())
        unlike = differences(Facts(**document["facts"]), self._facts, own)
        if unlike:
            raise TrainerFailure(
                Reason.CHECKPOINT_INCOMPATIBLE,
                f"{chosen.folder} does not fit this job: {'; '.join(unlike)}. Start a new job with the checkpoint's "
                "values, or without it (checkpoint.resume: Never, no checkpoint.from).",
            )
        state = State.from_wire(document["state"])
        return state if own else replace(state, metrics=None, best=None)

    def _with_its_best(self, state: State) -> State:
        """The state of a checkpoint that was fallen back to may name a best one that a later best has ousted."""
        if state.best is None or state.best.step == state.step:
            return state
        problem = self._problem(state.best.step)
        if problem is None:
            return state
        log.warning("the best checkpoint so far is lost, the best from here on will be kept: %s", problem)
        return replace(state, best=None)

    def _problem(self, step: int) -> str | None:
        """Why an own checkpoint cannot be used, as all ranks together see it; None where it is whole."""
        folder = files.folder_of(self._place.root, step)
        entry: Committed | None = self._runtime.control.gather(files.read_committed(folder))[0]
        return f"{folder}: it is not committed" if entry is None else self._damage(entry)

    def _describe(self, entry: Committed) -> Checkpoint:
        return Checkpoint(
            step=entry.manifest.step,
            time=entry.manifest.time,
            uri=f"{self._place.uri.rstrip('/')}/checkpoints/{entry.folder.name}",
            size_bytes=entry.size_bytes,
            digest=entry.digest,
        )


_TORCH_WRITE_ERRORS = ("inline_container", "iostream error")


def _storage_full(error: Exception, root: Path) -> TrainerFailure | None:
    """The failure where `error` is of a full storage; torch.save hides the error number and names its own source
    file, or, where the file system fails while the file is closed, only the stream."""
    hidden = isinstance(error, RuntimeError) and any(part in str(error) for part in _TORCH_WRITE_ERRORS)
    if not hidden and classify(error)[0] is not Reason.STORAGE_FULL:
        return None
    free = shutil.disk_usage(root).free
    return TrainerFailure(
        Reason.STORAGE_FULL,
        f"{root}: the checkpoint could not be written, {free:,} bytes were free then ({error}). The older checkpoints "
        "are whole. Enlarge or empty the claim, or lower checkpoint.keepLast, then run the job anew.",
    )


def random_state() -> dict[str, Any]:
    """Every generator of this process, in types that torch.load(weights_only=True) takes."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)),
    }


def restore_random(state: dict[str, Any]) -> None:
    """Sets every generator of this process."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, gauss))


def _random_name(rank: int) -> str:
    return f"rank-{rank:05d}.pt"
