"""Writing one checkpoint: straight to the storage, or to the node first and from there beside the training.

Used by checkpoint.py; all ranks call every method together. Either way it comes into being by the manifest and the
rename of rank 0, when every file of every rank is on the storage: what was not copied to its end was never committed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from posttrain_api.reasons import Reason
from posttrain_trainer import checkpoint_files as files
from posttrain_trainer.checkpoint_choice import Place
from posttrain_trainer.checkpoint_copy import Copy
from posttrain_trainer.checkpoint_facts import Facts
from posttrain_trainer.checkpoint_files import Committed, FileEntry, Manifest
from posttrain_trainer.engine_adopt import Written
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.fence import Fence
from posttrain_trainer.record import utc_now
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.signs import growing
from posttrain_trainer.state import State
from posttrain_trainer.storage import ROOM, refusal

STATE = "trainer.json"
_NODE_SAYS = {
    Reason.STORAGE_FULL: "the node has no room for its part of a checkpoint ({}). The older checkpoints are whole. "
    "Give the pods more memory (staging Memory) or nodes with a larger disk (Disk), or leave staging out, then run the "
    "job anew.",
    Reason.STORAGE_READ_ONLY: "the node's disk can only be read ({}). The older checkpoints are whole. Have the node "
    "repaired or drained, or leave staging out, then run the job anew.",
}


class Saved(Protocol):
    """What has weights and optimizer states of its own: an engine, or several (roles.py)."""

    def save(self, folder: Path) -> None:
        """Writes its files below `folder`; all ranks call it."""

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote; all ranks call it. TrainerFailure(CheckpointIncompatible)."""

    def adopt(self, folder: Path, written: Written) -> None:
        """Reads what `save` wrote on another number of ranks or at another ZeRO stage; all ranks call it."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds. `generators`: random_state() of this rank."""

    saved: Saved
    state: State
    generators: dict[str, Any]


@dataclass(frozen=True)
class Staged:
    """A checkpoint that lies on the nodes and is being copied. `began`: monotonic, seconds; `taken`: RFC 3339 in UTC,
    when it was whole there."""

    state: State
    began: float
    taken: str
    copy: Copy


@dataclass(frozen=True)
class Room:
    """Of one rank. `node`: alike for the ranks of a node; `free`: bytes there; `part`: what this rank needs of them."""

    node: int
    free: int
    part: int


def all_fit(rooms: Sequence[Room]) -> bool:
    """Whether every node has room for the parts of all its ranks together."""
    needed: dict[int, int] = {}
    for room in rooms:
        needed[room.node] = needed.get(room.node, 0) + room.part
    return all(not room.part or room.free >= ROOM * needed[room.node] for room in rooms)


class Writer:
    """Of one run. `owns`: whether this rank may remove the folder of the save that has failed."""

    def __init__(self, place: Place, runtime: Runtime, facts: Facts, fence: Fence) -> None:
        self._place, self._runtime, self._facts, self._fence = place, runtime, facts, fence
        self._part = 0
        self.owns = True

    @property
    def _local(self) -> Path:
        assert self._place.staging is not None
        return self._place.staging / f"rank-{self._runtime.rank:05d}"

    def clear(self) -> None:
        """What this rank has on the node goes, also of an attempt that was killed. It only costs room: the next stage
        begins with it again."""
        if self._place.staging is not None:
            shutil.rmtree(self._local, ignore_errors=True)

    def temporary(self, step: int) -> Path:
        """The folder on the storage until it is committed."""
        return files.temporary_of(self._place.root, step, self._fence.attempt)

    def room(self) -> Room:
        """On this rank's node, for a part as large as its last one; what the first one needs nobody knows."""
        free = shutil.disk_usage(self._local.parent).free if self._part else 0
        return Room(self._runtime.rank - self._runtime.local_rank, free, self._part)

    def write(self, content: Content) -> Committed | None:
        """Straight to the storage. The committed checkpoint on rank 0, None on the others."""
        runtime, began, step = self._runtime, time.monotonic(), content.state.step
        temporary = self.temporary(step)
        with growing(temporary) if runtime.first else nullcontext():
            self._begin(temporary)
            self._fill(temporary, content)
            runtime.control.barrier()
            # All of what any rank sees: a network file system may show a file of another node late.
            names = sorted(set().union(*runtime.control.gather(files.files_below(temporary))))
            mine = names[runtime.rank :: runtime.ranks]
            listed, took = self._listed(files.entries(temporary, mine), time.monotonic() - began)
        return self._commit(listed, content.state, (utc_now(), took))

    def stage(self, content: Content) -> Staged:
        """To this rank's folder on its node, from where it is copied while the caller goes on.
        TrainerFailure(StorageFull, StorageReadOnly) where the node takes nothing."""
        began, temporary, local = time.monotonic(), self.temporary(content.state.step), self._local
        with _node_failures(local), growing(local):
            if local.exists():  # not `clear`: what cannot be removed is known here, and told
                shutil.rmtree(local)
            local.mkdir(parents=True)
            self._fill(local, content)
            sizes = {name: (local / name).stat().st_size for name in files.files_below(local)}
            self._part = sum(sizes.values())
        taken = utc_now()
        self._begin(temporary)
        return Staged(content.state, began, taken, Copy(local, temporary, sizes))

    def land(self, staged: Staged) -> Committed | None:
        """Waits for the copies of all ranks and commits, as `write`. Raises what has ended this rank's copy."""
        entries, ended = staged.copy.wait()
        listed, took = self._listed(entries, ended - staged.began)
        self.clear()
        return self._commit(listed, staged.state, (staged.taken, took))

    def _begin(self, temporary: Path) -> None:
        self.owns = True
        if self._runtime.first:
            self._fence.check()
            (self._place.root / files.GOOD).unlink(missing_ok=True)  # of an attempt before: this one has gone on
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._runtime.control.barrier()

    def _fill(self, folder: Path, content: Content) -> None:
        if self._runtime.first:
            files.write_json(folder / STATE, {"state": content.state.to_wire(), "facts": vars(self._facts)})
        torch.save(content.generators, folder / generators_name(self._runtime.rank))
        content.saved.save(folder)

    def _listed(self, mine: dict[str, FileEntry], seconds: float) -> tuple[dict[str, FileEntry], float]:
        """The files of all ranks, and the most seconds that one of them took. From here on rank 0 may rename the
        folder: what another rank removed then, it might remove under its new name."""
        self.owns = self._runtime.first
        parts, took = zip(*self._runtime.control.gather((mine, seconds)), strict=True)
        return {name: entry for part in parts for name, entry in part.items()}, round(max(took), 3)

    def _commit(self, listed: dict[str, FileEntry], state: State, when: tuple[str, float]) -> Committed | None:
        """`when`: the time of the state, and how many seconds the save took."""
        if not self._runtime.first:
            return None
        taken, took = when
        manifest = Manifest(step=state.step, time=taken, attempt=self._fence.attempt, files=listed, save_seconds=took)
        final = files.folder_of(self._place.root, state.step)
        self._fence.check()
        files.commit(self.temporary(state.step), final, manifest)
        files.prune(self._place.root, self._place.keep, state.spared)
        files.replace_json(self._place.record, {"step": state.step, "folder": final.name, "time": utc_now()})
        return Committed(final, manifest)


def generators_name(rank: int) -> str:
    """File of a rank's random generators in a checkpoint."""
    return f"rank-{rank:05d}.pt"


@contextmanager
def _node_failures(local: Path) -> Iterator[None]:
    """What the node's file system refuses is not the claim's doing: the words differ, and what helps."""
    try:
        yield
    except Exception as error:
        reason = refusal(error, local.parent)
        if reason is None:
            raise
        shutil.rmtree(local, ignore_errors=True)  # best effort: the error itself is what matters
        raise TrainerFailure(reason, f"checkpoint.staging: {local}: {_NODE_SAYS[reason].format(error)}") from error
