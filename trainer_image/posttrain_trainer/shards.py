"""A training state by parameter name, whoever's shards hold it: what lets another number of ranks go on with it.

DeepSpeed keeps the optimizer's state in flat tensors, cut over the ranks in a way of its own at each ZeRO stage, and
reads them only where they were cut alike; its universal checkpoints write everything twice more to the disk, and load
wrongly at ZeRO 3 (docs/decisions). So the flat tensors are described here as slices of named parameters, those of a
checkpoint and those of the running engine alike, and copied from the ones to the others. Pure: tensors come in, tensors
are filled. Called by engine_adopt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps for each element, by torch's names."""
Shapes = Sequence[Mapping[str, Sequence[int]]]
"""DeepSpeed's `param_shapes`: for each flat tensor of ZeRO 3 its parameters in order."""


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + count) of a flattened parameter lie at `offset` of a flat tensor."""

    name: str
    start: int
    count: int
    offset: int


@dataclass(frozen=True)
class Flat:
    """One flat tensor [n] of the optimizer on one rank. `tensors`: its fp32 weights, and Adam's moments once it has
    stepped; `steps`: Adam's count of steps."""

    slices: tuple[Slice, ...]
    tensors: Mapping[str, Tensor]
    steps: float = 0.0


@dataclass(frozen=True)
class State:
    """All flat tensors of all ranks, to be asked by name."""

    flats: Sequence[Flat]
    _parts: dict[str, list[tuple[Slice, Flat]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for flat in self.flats:
            for part in flat.slices:
                self._parts[part.name].append((part, flat))

    def missing(self, names: Mapping[str, int]) -> list[str]:
        """Of parameters and their numbers of elements those that this state does not hold whole, or holds otherwise."""
        held = {name: sum(part.count for part, _ in parts) for name, parts in self._parts.items()}
        return sorted(name for name in names.keys() | held.keys() if names.get(name) != held.get(name))

    def steps(self, names: Iterable[str]) -> float:
        """Adam's count of steps, of parameters that are stepped together; 0 where it has no moments of any."""
        flats = [flat for name in names for _, flat in self._parts[name]]
        found = {flat.steps for flat in flats if MOMENTS[0] in flat.tensors}
        if len(found) > 1:
            raise ValueError(f"parameters that are stepped together were stepped {sorted(found)} times")
        return found.pop() if found else 0.0

    def fill(self, target: Tensor, slices: Iterable[Slice], kind: str) -> None:
        """Copies into a flat tensor [n] what its slices are of; elsewhere, and where Adam has no moments, it stays."""
        for wanted in slices:
            for part, flat in self._parts[wanted.name]:
                first = max(wanted.start, part.start)
                count = min(wanted.start + wanted.count, part.start + part.count) - first
                source = flat.tensors.get(kind)
                if count > 0 and source is not None:
                    there, here = part.offset + first - part.start, wanted.offset + first - wanted.start
                    target.narrow(0, here, count).copy_(source.narrow(0, there, count))

    def whole(self, name: str, shape: Sequence[int]) -> Tensor:
        """A parameter's fp32 weights."""
        value = torch.empty(prod(shape))
        self.fill(value, [Slice(name, 0, value.numel(), 0)], WEIGHT)
        return value.reshape(tuple(shape))


def plain(weights: Mapping[str, Tensor], optimizer: Mapping[str, Any], groups: Sequence[Sequence[str]]) -> list[Flat]:
    """ZeRO 0: every parameter is a flat tensor of its own. `optimizer`: torch's state_dict; `groups`: the names of its
    parameters, in its order."""
    flats = []
    for index, name in enumerate(name for group in groups for name in group):
        state = optimizer["state"].get(index) or {}
        tensors = {WEIGHT: weights[name], **_moments(state)}
        whole = Slice(name, 0, weights[name].numel(), 0)
        flats.append(Flat((whole,), {kind: value.reshape(-1) for kind, value in tensors.items()}, _steps(state)))
    return flats


def partitioned(ranks: Sequence[Mapping[str, Any]]) -> list[list[Flat]]:
    """ZeRO 1 and 2, by rank: each has one flat tensor for each group. A parameter may go on on the next rank, from
    where the one before it ends. `ranks`: the optimizers' state_dicts."""
    ends: dict[str, int] = defaultdict(int)
    found = []
    for rank in ranks:
        flats = []
        for index, mapping in enumerate(rank["param_slice_mappings"]):
            slices = []
            for name, place in mapping.items():
                slices.append(Slice(name, ends[name], place.numel, place.start))
                ends[name] += place.numel
            state = rank["base_optimizer_state"]["state"].get(index) or {}
            weights = rank["single_partition_of_fp32_groups"][index]
            flats.append(Flat(tuple(slices), {WEIGHT: weights, **_moments(state)}, _steps(state)))
        found.append(flats)
    return found


def zero3(optimizer: Mapping[str, Any], shapes: Shapes, rank: int, ranks: int) -> list[Flat]:
    """ZeRO 3, one rank: of each parameter it has ceil(n / ranks) elements in each of its flat tensors, the last ranks
    padding."""
    flats = []
    for index, group in enumerate(shapes):
        state = optimizer["optimizer_state_dict"]["state"].get(index) or {}
        slices, offset = [], 0
        for name, shape in group.items():
            size = prod(shape)
            share = -(-size // ranks)
            slices.append(Slice(name, rank * share, max(0, min(share, size - rank * share)), offset))
            offset += share
        tensors = {WEIGHT: optimizer["fp32_flat_groups"][index], **_moments(state)}
        flats.append(Flat(tuple(slices), tensors, _steps(state)))
    return flats


def _moments(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {kind: state[kind] for kind in MOMENTS if kind in state}


def _steps(state: Mapping[str, Any]) -> float:
    return float(state.get("step", 0.0))
