"""Saving and resuming: everything a later attempt needs to go on bit for bit.

Called by the worker (resume) and the loop (save). All ranks call every method together. A committed checkpoint that
cannot be used ends the job with CheckpointIncompatible; only where none was ever committed is a fresh start right.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from posttrain_api.reasons import Reason
from posttrain_api.records import Checkpoint
from posttrain_trainer import checkpoint_files as files
from posttrain_trainer.checkpoint_choice import Chooser, Place
from posttrain_trainer.checkpoint_facts import Facts, differences
from posttrain_trainer.checkpoint_files import Committed, Manifest
from posttrain_trainer.engine_adopt import Written
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.fence import Fence
from posttrain_trainer.randomness import restore_random, seed_anew
from posttrain_trainer.record import utc_now
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.signs import growing
from posttrain_trainer.state import State
from posttrain_trainer.storage import has_room, make_room, storage_failure

STATE = "trainer.json"
_OTHERWISE = (
    "Start a new job with the checkpoint's values, or without it (checkpoint.resume: Never, no checkpoint.from)."
)
_ELASTIC = "Another number of processes or ZeRO stage goes on in a new job, whose checkpoint.from names this one."
log = logging.getLogger(__name__)


class Saved(Protocol):
    """What has weights and optimizer states of its own: an engine, or several (roles.py)."""

    def save(self, folder: Path) -> None:
        """Writes its files below `folder`; all ranks call it."""

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote; all ranks call it. TrainerFailure(CheckpointIncompatible)."""

    def adopt(self, folder: Path, written: Written) -> None:
        """Reads what `save` wrote on another number of ranks or at another ZeRO stage; all ranks call it."""


class Checkpoints:
    """The checkpoints of one run. `last`: the newest that this attempt resumed from or committed."""

    def __init__(self, place: Place, runtime: Runtime, facts: Facts, fence: Fence) -> None:
        self.last: Checkpoint | None = None
        self.fence = fence
        self._place = place
        self._runtime = runtime
        self._facts = facts
        self._chooser = Chooser(place, runtime)

    def resume(self, saved: Saved) -> State:
        """Loads the newest whole checkpoint; State() for a fresh start. TrainerFailure(CheckpointIncompatible)."""
        self._prepare_root()
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
            restore_random(torch.load(folder / _random_name(self._runtime.rank), weights_only=True))
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

    def save(self, saved: Saved, state: State, random_state: dict[str, Any]) -> Checkpoint:
        """Commits a checkpoint of `state` and removes the oldest. TrainerFailure(StorageFull,
        StorageReadOnly) leaves the older ones whole."""
        temporary = files.temporary_of(self._place.root, state.step, self.fence.attempt)
        try:
            self._make_room(state)
            with growing(temporary) if self._runtime.first else nullcontext():
                committed = self._write(temporary, saved, state, random_state)
        except Exception as error:
            failure = storage_failure(error, self._place.root, self._place.uri)
            shutil.rmtree(temporary, ignore_errors=True)  # best effort: the error itself is what matters
            if failure is not None:
                raise failure from error
            raise
        # Rank 0 tells the others: a rename on a network file system may show late on another node.
        last: Checkpoint = self._runtime.control.gather(self._describe(committed) if committed else None)[0]
        self.last = last
        return last

    def end_at(self, step: int) -> None:
        """Whoever starts from this run without naming a checkpoint starts from that of `step`: those after it are of a
        training that a guard has ended. Rank 0 only."""
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

    def _write(self, temporary: Path, saved: Saved, state: State, random_state: dict[str, Any]) -> Committed | None:
        """The committed checkpoint on rank 0, None on the others."""
        runtime, began = self._runtime, time.monotonic()
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
        took = round(time.monotonic() - began, 3)
        manifest = Manifest(
            step=state.step, time=utc_now(), attempt=self.fence.attempt, files=listed, save_seconds=took
        )
        final = files.folder_of(self._place.root, state.step)
        self.fence.check()
        files.commit(temporary, final, manifest)
        files.prune(self._place.root, self._place.keep, state.spared)
        files.replace_json(self._place.record, {"step": state.step, "folder": final.name, "time": manifest.time})
        return Committed(final, manifest)

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
        problem = self._chooser.problem(state.best.step)
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


def _random_name(rank: int) -> str:
    return f"rank-{rank:05d}.pt"
