"""Saving and resuming: everything a later attempt needs to go on bit for bit.

Called by the worker (resume) and the loop (save, or stage and land). All ranks call every method together. A committed
checkpoint that cannot be used ends the job with CheckpointIncompatible; only where none was ever committed is a fresh
start right.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from posttrain_api.reasons import Reason
from posttrain_api.records import Checkpoint
from posttrain_trainer import checkpoint_files as files
from posttrain_trainer.checkpoint_choice import Chooser, Place
from posttrain_trainer.checkpoint_facts import Facts, differences
from posttrain_trainer.checkpoint_files import Committed
from posttrain_trainer.checkpoint_write import (
    STATE,
    Content,
    Saved,
    Staged,
    Writer,
    all_fit,
    generators_name,
)
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.fence import Fence
from posttrain_trainer.randomness import restore_random, seed_anew
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.state import State
from posttrain_trainer.storage import has_room, make_room, storage_failure

_OTHERWISE = (
    "Start a new job with the checkpoint's values, or without it (checkpoint.resume: Never, no checkpoint.from)."
)
_ELASTIC = "Another number of processes or ZeRO stage goes on in a new job, whose checkpoint.from names this one."
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Landed:
    """A checkpoint that was staged, once it is committed, and the state that it is of."""

    checkpoint: Checkpoint
    state: State


class Checkpoints:
    """The checkpoints of one run. `last`: the newest that this attempt resumed from or committed."""

    def __init__(self, place: Place, runtime: Runtime, facts: Facts, fence: Fence) -> None:
        self.last: Checkpoint | None = None
        self.fence = fence
        self._place = place
        self._runtime = runtime
        self._facts = facts
        self._writer = Writer(place, runtime, facts, fence)
        self._staged: Staged | None = None
        self._chooser = Chooser(place, runtime)

    def resume(self, saved: Saved) -> State:
        """Loads the newest whole checkpoint; State() for a fresh start. TrainerFailure(CheckpointIncompatible)."""
        self._prepare_root()
        self._writer.clear()
        choice = self._chooser.choose()
        if self._runtime.first:
            files.remove_unfinished(self._place.root)
        if choice.chosen is None:
            return State()
        chosen, own = choice.chosen, choice.chosen.folder.parent == self._place.root
        facts, state = self._check(chosen, own)
        state = self._with_its_best(state)
        self._load(saved, chosen.folder, facts, state.step)
        log.info("resumed from %s at step %d", chosen.folder, state.step)
        if own:
            refused = "; ".join(choice.refused)[:1024]
            self.last = self._describe(chosen).model_copy(update={"refused": refused or None})
        return state

    def _load(self, saved: Saved, folder: Path, facts: Facts, step: int) -> None:
        """As it was written, to the bit, where the files are cut as this job's; else by the parameters' names."""
        if facts.layout == self._facts.layout:
            saved.load(folder)
        else:
            log.info("%s was written by %s: its state is taken over by name", folder, facts.written)
            saved.adopt(folder, facts.written)
        if facts.written.ranks == self._runtime.ranks:
            restore_random(torch.load(folder / generators_name(self._runtime.rank), weights_only=True))
        else:
            seed_anew(self._facts.seed, step, self._runtime.rank)

    def load(self, saved: Saved, step: int) -> None:
        """The weights of an own checkpoint. TrainerFailure(CheckpointIncompatible) where it is not whole."""
        problem = self._chooser.problem(step)
        if problem is not None:
            raise TrainerFailure(
                Reason.CHECKPOINT_INCOMPATIBLE,
                f"The best checkpoint cannot be exported: {problem}. The output is whole. Restore the file and run the "
                "job anew, or switch evaluation.keepBest off.",
            )
        saved.load(files.folder_of(self._place.root, step))

    def save(self, content: Content) -> Checkpoint:
        """Commits a checkpoint and removes the oldest. TrainerFailure(StorageFull, StorageReadOnly) leaves the older
        ones whole."""
        with self._failures(content.state.step):
            self._make_room(content.state)
            committed = self._writer.write(content)
        return self._told(committed)

    def stage(self, content: Content) -> None:
        """Begins one that is copied to the storage while the caller goes on; nothing is saved before `land`. What was
        begun before must have landed. Failures: as `save`."""
        assert self._staged is None
        with self._failures(content.state.step):
            self._make_room(content.state)
            self._staged = self._writer.stage(content)

    def land(self) -> Landed:
        """Waits for what `stage` began, and commits it. Failures: as `save`."""
        assert self._staged is not None
        staged, self._staged = self._staged, None
        if staged.copy.running:
            log.info("training waits: step %d is still being copied to the storage", staged.state.step)
        with self._failures(staged.state.step):
            committed = self._writer.land(staged)
        return Landed(self._told(committed), staged.state)

    def can_stage(self) -> bool:
        """Whether the job wishes it and every node has room for parts as large as the last ones. All ranks ask
        together."""
        if self._place.staging is None:
            return False
        fits = all_fit(self._runtime.control.gather(self._writer.room()))
        if not fits and self._runtime.first:
            log.warning("checkpoint.staging: a node has no room for its part: this save goes straight to the storage")
        return fits

    @property
    def staged(self) -> bool:
        """Whether one is on its way: `land` commits it."""
        return self._staged is not None

    @property
    def copying(self) -> bool:
        """Whether this rank is still at it; others may be later or earlier."""
        return self._staged is not None and self._staged.copy.running

    @property
    def newest_step(self) -> int | None:
        """Of what is committed or on its way."""
        if self._staged is not None:
            return self._staged.state.step
        return None if self.last is None else self.last.step

    def without_landing(self, step: int | None) -> int | None:
        """`step`, or the step of the checkpoint before it where it is only on its way. None: of none."""
        if self._staged is None or self._staged.state.step != step:
            return step
        return None if self.last is None else self.last.step

    @contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        """What a failed save leaves is removed; a storage that takes nothing more is told in words."""
        try:
            yield
        except Exception as error:
            failure = storage_failure(error, self._place.root, self._place.uri)
            if self._writer.owns:
                shutil.rmtree(self._writer.temporary(step), ignore_errors=True)  # best effort: the error matters
            if failure is not None:
                raise failure from error
            raise

    def _told(self, committed: Committed | None) -> Checkpoint:
        """Rank 0 tells the others: a rename on a network file system may show late on another node."""
        last: Checkpoint = self._runtime.control.gather(self._describe(committed) if committed else None)[0]
        self.last = last
        return last

    def end_at(self, step: int) -> None:
        """Whoever starts from this run without naming a checkpoint starts from that of `step`, or from an older one
        where there is none: those after it are of a training that a guard has ended. Rank 0 only."""
        self.fence.check()
        files.replace_json(self._place.root / files.GOOD, {"step": step})

    def uri_of(self, step: int) -> str:
        """Of an own checkpoint, as the outside names it."""
        return f"{self._place.uri.rstrip('/')}/checkpoints/{files.folder_of(self._place.root, step).name}"

    def _make_room(self, state: State) -> None:
        """Where another one does not fit, the oldest go before it is written instead of after: never the newest, which
        must be whole, nor those that are spared."""
        newest, root = self._chooser.newest(), self._place.root
        if newest is None or not self._runtime.control.any(self._runtime.first and not has_room(root, newest)):
            return
        problem = self._chooser.damage(newest)
        if problem is not None:
            log.warning("the storage is nearly full, but nothing is removed: the newest is damaged: %s", problem)
        elif self._runtime.first:
            self.fence.check()
            removed = make_room(root, newest, state.spared)
            log.warning("%s: no room for another checkpoint; removed before it is written: %s", root, removed or "none")

    def _prepare_root(self) -> None:
        if self._runtime.first:
            self.fence.check()
            self._place.root.mkdir(parents=True, exist_ok=True)
            files.bring_back(self._place.root)
        self._runtime.control.barrier()

    def _check(self, chosen: Committed, own: bool) -> tuple[Facts, State]:
        document = json.loads((chosen.folder / STATE).read_text())
        facts = Facts.from_wire(document["facts"])
        unlike = differences(facts, self._facts, own)
        if unlike:
            way = _ELASTIC if own and facts.layout != self._facts.layout else _OTHERWISE
            raise TrainerFailure(
                Reason.CHECKPOINT_INCOMPATIBLE, f"{chosen.folder} does not fit this job: {'; '.join(unlike)}. {way}"
            )
        state = State.from_wire(document["state"])
        return facts, state if own else state.elsewhere()

    def _with_its_best(self, state: State) -> State:
        """The state of a checkpoint that was fallen back to may name a best one that a later best has ousted."""
        if state.best is None or state.best.step == state.step:
            return state
        try:
            problem = self._chooser.problem(state.best.step)
        except OSError as error:  # it may be whole: it stays, and who exports it is told
            log.warning("the best checkpoint so far cannot be read now: %s", error)
            return state
        if problem is None:
            return state
        log.warning("the best checkpoint so far is lost, the best from here on will be kept: %s", problem)
        return replace(state, best=None)

    def _describe(self, entry: Committed) -> Checkpoint:
        return Checkpoint(
            step=entry.manifest.step,
            time=entry.manifest.time,
            uri=self.uri_of(entry.manifest.step),
            size_bytes=entry.size_bytes,
            digest=entry.digest,
            save_seconds=entry.manifest.save_seconds,
        )
