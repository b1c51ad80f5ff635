"""An engine goes on with what another number of ranks, or another ZeRO stage, has saved.

Called by Engine.adopt. Reading is by memory map: a rank reads the shards' elements that are its own, and, below ZeRO 3,
all weights. What is put together is handed to DeepSpeed's own loading, as if this rank had saved it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.shards import MOMENTS, WEIGHT, Flat, Shapes, State, partitioned, plain, zero3

Groups = Sequence[Sequence[str]]
"""Names of the parameters that learn, by group of the optimizer."""


@dataclass(frozen=True)
class Written:
    """Who wrote a checkpoint: how many ranks, at which ZeRO stage."""

    ranks: int
    zero_stage: int


@dataclass(frozen=True)
class Adopter:
    """`engine`: DeepSpeed's; `rank`, `ranks`: of this job."""

    engine: Any
    groups: Groups
    rank: int
    ranks: int

    def adopt(self, folder: Path, written: Written) -> None:
        """Weights, moments, count of steps, buffers. The optimizer's other settings stay this job's. TrainerFailure
        where the parameters are not the same."""
        model, state = self._read(folder, written)
        missing = state.missing(self._sizes())
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise TrainerFailure(
                Reason.CHECKPOINT_INCOMPATIBLE,
                f"{folder}: the parameters that learn are not this job's: {shown}. Start from a checkpoint of the same "
                "model and tuning.",
            )
        with torch.no_grad():
            self._buffers(model["module"])
            if self._stage < 3:
                self._weights(state)
            fill = {0: self._fill_plain, 3: self._fill_zero3}.get(self._stage, self._fill_partitioned)
            fill(state)

    @property
    def _stage(self) -> int:
        return int(self.engine.zero_optimization_stage())

    def _read(self, folder: Path, written: Written) -> tuple[Mapping[str, Any], State]:
        first = "mp_rank_00" if written.zero_stage < 3 else "zero_pp_rank_0_mp_rank_00"
        model = _load(folder / f"{first}_model_states.pt")
        if written.zero_stage == 0:
            return model, State(plain(model["module"], model["optimizer"], self.groups))
        shards = [_load(_shard(folder, rank))["optimizer_state_dict"] for rank in range(written.ranks)]
        if written.zero_stage < 3:
            return model, State([flat for flats in partitioned(shards) for flat in flats])
        shapes: Shapes = model["param_shapes"]
        flats = [flat for rank, shard in enumerate(shards) for flat in zero3(shard, shapes, rank, written.ranks)]
        return model, State(flats)

    def _sizes(self) -> dict[str, int]:
        learning = {name for group in self.groups for name in group}
        sizes = ((name, _numel(parameter)) for name, parameter in self.engine.module.named_parameters())
        return {name: size for name, size in sizes if name in learning}

    def _buffers(self, saved: Mapping[str, Tensor]) -> None:
        for name, buffer in self.engine.module.named_buffers():
            if name in saved:
                buffer.copy_(saved[name])

    def _weights(self, state: State) -> None:
        parameters = dict(self.engine.module.named_parameters())
        for name in (name for group in self.groups for name in group):
            parameters[name].copy_(state.whole(name, parameters[name].shape))

    def _fill_plain(self, state: State) -> None:
        optimizer = self.engine.optimizer
        ours = optimizer.state_dict()
        weights = {name: value.detach() for name, value in self.engine.module.named_parameters()}
        flats = plain(weights, {"state": {}}, self.groups)
        shapes = (weights[name].shape for group in self.groups for name in group)
        states = {
            index: {name: value.reshape(shape) if value.ndim else value for name, value in each.items()}
            for index, (each, shape) in enumerate(zip(_states(flats, state), shapes, strict=True))
        }
        optimizer.load_state_dict({**ours, "state": states})

    def _fill_partitioned(self, state: State) -> None:
        optimizer = self.engine.optimizer
        ours = optimizer.state_dict()
        everybody: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(everybody, ours["param_slice_mappings"])
        masters = [torch.zeros(each.numel()) for each in _masters(optimizer)]
        empty = {"base_optimizer_state": {"state": {}}, "single_partition_of_fp32_groups": masters}
        flats = partitioned([{**empty, "param_slice_mappings": mappings} for mappings in everybody])[self.rank]
        base = {**ours["base_optimizer_state"], "state": dict(enumerate(_states(flats, state, self.groups)))}
        for flat in flats:
            state.fill(flat.tensors[WEIGHT], flat.slices, WEIGHT)
        filled = {**ours, "base_optimizer_state": base, "single_partition_of_fp32_groups": masters}
        optimizer.load_state_dict([filled] * self.ranks, load_optimizer_states=True, load_from_fp32_weights=True)

    def _fill_zero3(self, state: State) -> None:
        optimizer, shapes = self.engine.optimizer, self.engine._get_zero_param_shapes()
        optimizer.checkpoint_event_prologue()
        ours = optimizer.state_dict()
        flats = zero3(ours, shapes, self.rank, self.ranks)
        for flat in flats:
            state.fill(flat.tensors[WEIGHT], flat.slices, WEIGHT)
        base = {**ours["optimizer_state_dict"], "state": dict(enumerate(_states(flats, state)))}
        optimizer.load_state_dict([{**ours, "optimizer_state_dict": base}] * self.ranks, load_optimizer_states=True)
        optimizer.checkpoint_event_epilogue()


def _states(flats: Sequence[Flat], state: State, groups: Groups | None = None) -> list[dict[str, Tensor]]:
    """torch's state of each flat tensor. `groups`: names of the group that a flat tensor is of, where this rank may
    have none of them."""
    made = []
    for index, flat in enumerate(flats):
        names = groups[index] if groups is not None else [part.name for part in flat.slices]
        moments = {kind: torch.zeros(flat.tensors[WEIGHT].numel()) for kind in MOMENTS}
        for kind, value in moments.items():
            state.fill(value, flat.slices, kind)
        # A tensor for each: one that is shared would be counted up once for each of them.
        made.append({"step": torch.tensor(state.steps(names)), **moments})
    return made


def _masters(optimizer: Any) -> list[Tensor]:
    """The flat fp32 weights of this rank, with their padding; of DeepSpeed's optimizer for ZeRO 1 in BF16 too."""
    found = getattr(optimizer, "single_partition_of_fp32_groups", None)
    masters: list[Tensor] = optimizer.fp32_groups_flat_partition if found is None else found
    return masters


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _shard(folder: Path, rank: int) -> Path:
    found = sorted(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
    if not found:
        raise TrainerFailure(
            Reason.CHECKPOINT_INCOMPATIBLE,
            f"{folder}: there is no optimizer state of rank {rank}. Start from another checkpoint.",
        )
    return found[0]


def _load(path: Path) -> Mapping[str, Any]:
    """By memory map: only what is copied is read. The checkpoint's digests have been checked."""
    state: Mapping[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return state
