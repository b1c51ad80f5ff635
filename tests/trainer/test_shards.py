"""Flat tensors of ranks as slices of named parameters: however it was cut, what is asked for by name comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain_trainer.shards import WEIGHT, Flat, Slice, State, partitioned, plain, zero3

SIZES = {"a.weight": (3, 4), "b.weight": (5,), "c.weight": (2, 2, 2), "d.bias": (1,)}
GROUPS = [["a.weight", "c.weight"], ["b.weight", "d.bias"]]


@dataclass
class Fragment:
    """As DeepSpeed's fragment_address."""

    start: int
    numel: int


def _values(offset: float) -> dict[str, torch.Tensor]:
    made, start = {}, offset
    for name, shape in SIZES.items():
        count = int(torch.tensor(shape).prod())
        made[name] = torch.arange(start, start + count).float().reshape(shape)
        start += count
    return made


KINDS = {WEIGHT: _values(0), "exp_avg": _values(100), "exp_avg_sq": _values(200)}


def _plain() -> State:
    order = [name for group in GROUPS for name in group]
    state = {
        index: {"step": torch.tensor(7.0), **{kind: KINDS[kind][name] for kind in ("exp_avg", "exp_avg_sq")}}
        for index, name in enumerate(order)
    }
    return State(plain(KINDS[WEIGHT], {"state": state}, GROUPS))


def _flat(group: list[str], kind: str, ranks: int) -> list[torch.Tensor]:
    """A group's parameters one after the other, padded and cut into equal parts."""
    whole = torch.cat([KINDS[kind][name].flatten() for name in group])
    share = -(-len(whole) // ranks)
    return list(torch.nn.functional.pad(whole, (0, share * ranks - len(whole)), value=-1.0).split(share))


def _partitioned(ranks: int) -> State:
    states: list[dict[str, Any]] = []
    for rank in range(ranks):
        mappings, state, weights = [], {}, []
        for index, group in enumerate(GROUPS):
            share = len(_flat(group, WEIGHT, ranks)[0])
            mapping, start = {}, 0
            for name in group:
                end = start + KINDS[WEIGHT][name].numel()
                first, last = max(start, rank * share), min(end, (rank + 1) * share)
                if first < last:
                    mapping[name] = Fragment(first - rank * share, last - first)
                start = end
            mappings.append(mapping)
            state[index] = {
                "step": torch.tensor(7.0),
                **{kind: _flat(group, kind, ranks)[rank] for kind in ("exp_avg", "exp_avg_sq")},
            }
            weights.append(_flat(group, WEIGHT, ranks)[rank])
        states.append(
            {
                "param_slice_mappings": mappings,
                "base_optimizer_state": {"state": state},
                "single_partition_of_fp32_groups": weights,
            }
        )
    return State([flat for flats in partitioned(states) for flat in flats])


def _zero3(ranks: int) -> State:
    shapes = [{name: SIZES[name] for name in group} for group in GROUPS]
    flats = []
    for rank in range(ranks):

        def part(group: list[str], kind: str, rank: int = rank) -> torch.Tensor:
            return torch.cat([_flat([name], kind, ranks)[rank] for name in group])

        state = {
            index: {"step": torch.tensor(7.0), **{kind: part(group, kind) for kind in ("exp_avg", "exp_avg_sq")}}
            for index, group in enumerate(GROUPS)
        }
        saved = {
            "optimizer_state_dict": {"state": state},
            "fp32_flat_groups": [part(group, WEIGHT) for group in GROUPS],
        }
        flats += zero3(saved, shapes, rank, ranks)
    return State(flats)


STATES = [_plain, *(lambda n=n: _partitioned(n) for n in (1, 2, 3, 7)), *(lambda n=n: _zero3(n) for n in (1, 2, 3, 7))]


@pytest.mark.parametrize("make", STATES)
def test_every_cut_gives_the_same(make: Any) -> None:
    state = make()
    assert state.missing({name: KINDS[WEIGHT][name].numel() for name in SIZES}) == []
    for name, shape in SIZES.items():
        assert torch.equal(state.whole(name, shape), KINDS[WEIGHT][name])
    for group in GROUPS:
        assert state.steps(group) == 7.0


@given(data=st.data(), which=st.integers(0, len(STATES) - 1))
def test_any_slice_is_filled_and_nothing_else(data: st.DataObject, which: int) -> None:
    state = STATES[which]()
    name = data.draw(st.sampled_from(sorted(SIZES)))
    size = KINDS[WEIGHT][name].numel()
    start = data.draw(st.integers(0, size - 1))
    count = data.draw(st.integers(0, size - start))
    offset = data.draw(st.integers(0, 3))
    for kind, values in KINDS.items():
        target = torch.full((count + 5,), -5.0)
        state.fill(target, [Slice(name, start, count, offset)], kind)
        assert torch.equal(target[offset : offset + count], values[name].flatten()[start : start + count])
        assert (target[:offset] == -5.0).all()
        assert (target[offset + count :] == -5.0).all()


def test_what_is_missing_is_named() -> None:
    state = _plain()
    sizes = {name: KINDS[WEIGHT][name].numel() for name in SIZES}
    assert state.missing({**sizes, "e.weight": 3}) == ["e.weight"]
    assert state.missing({**sizes, "b.weight": 6}) == ["b.weight"]
    assert state.missing({name: size for name, size in sizes.items() if name != "b.weight"}) == ["b.weight"]


def test_a_parameter_that_was_never_stepped_has_no_moments() -> None:
    """Adam's own start: zeros, and no steps."""
    state = State(plain(KINDS[WEIGHT], {"state": {}}, GROUPS))
    target = torch.zeros(5)
    state.fill(target, [Slice("b.weight", 0, 5, 0)], "exp_avg")
    assert (target == 0).all()
    assert state.steps(["b.weight"]) == 0.0


def test_steps_that_differ_are_refused() -> None:
    """They are counted once for a flat tensor: taking one of them would correct the others' bias wrongly."""
    one = {WEIGHT: torch.ones(1), "exp_avg": torch.ones(1)}
    state = State([Flat((Slice(name, 0, 1, 0),), one, steps) for name, steps in (("x", 3.0), ("y", 4.0))])
    with pytest.raises(ValueError, match=r"stepped \[3.0, 4.0\] times"):
        state.steps(["x", "y"])
