"""A micro-batch: what one forward of the model sees, built from rows of a token set.

Called by `batching`. There is never an attention mask. Padded on the right, a causal model's real positions do not see
the padding; packed into one line, the positions begin at 0 with each sequence and so tell the attention where one ends.
Everything that a loss needs to know about its rows is in here, so that an algorithm asks nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain_trainer.tokenset import Example, TrainingRow


@dataclass(frozen=True)
class MicroBatch:
    """One forward over s sequences of r rows (s = r · arity; the sequences of a row follow each other).

    input_ids [b, T] int64, without a sequence's last token where only log-probabilities are asked for; index [n]:
    counted positions in the flattened [b·T]; targets [n]: the token that follows each; weights [n] float32; sequence
    [n] int64: whose position it is; each: further numbers of the counted positions, float32 [n]; ends [s]: each
    sequence's last real token in the flattened [b·T]; rows [r] float32: 1, and 0 in a dummy; values: numbers by row
    [r], and the reference's log-probabilities by sequence [s] as `reference`; tokens: real tokens of its rows, 0 in a
    dummy; numbers: of its rows in the token set.
    """

    input_ids: Tensor
    index: Tensor
    targets: Tensor
    weights: Tensor
    sequence: Tensor
    ends: Tensor
    rows: Tensor
    tokens: int
    values: Mapping[str, Tensor] = field(default_factory=dict)
    each: Mapping[str, Tensor] = field(default_factory=dict)
    positions: Tensor | None = None
    """[b, T] int64 of packed sequences: starts from 0 with each. None: one sequence per line."""
    numbers: tuple[int, ...] = ()

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`."""
        if device.type == "cpu":
            return self
        moved = {name: _moved(getattr(self, name), device) for name in (each.name for each in fields(self))}
        return replace(self, **moved)

    def by_sequence(self, each: Tensor) -> Tensor:
        """Σ over the counted tokens of each sequence. each: [n] → fp32 [s], with gradient."""
        sums = torch.zeros(len(self.ends), dtype=torch.float32, device=each.device)
        return sums.index_add(0, self.sequence, each.float())

    def counts(self) -> Tensor:
        """Counted tokens of each sequence, fp32 [s]."""
        return self.by_sequence((self.weights > 0).float())


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: tensor.to(device, non_blocking=True) for name, tensor in value.items()}
    return value


def collate(rows: Sequence[TrainingRow], whole: bool = False, packed: bool = False) -> MicroBatch:
    """Pads on the right with token 0, which no counted position ever sees; or, `packed`, puts all sequences into one
    line. `whole`: the last token of a sequence is an input too, because its hidden state is asked for."""
    examples = [example for row in rows for example in row.examples]
    lengths = np.array([len(example.tokens) for example in examples])
    kept = lengths - (0 if whole else 1)
    shape, starts = _packed(kept) if packed else _padded(kept)
    ids = np.zeros(shape[0] * shape[1], dtype=np.int64)
    for example, start, inputs in zip(examples, starts, kept, strict=True):
        ids[start : start + inputs] = example.tokens[:inputs]
    counted = [np.flatnonzero(example.mask[1:]) for example in examples]
    targets = _joined([example.tokens[1:][chosen] for example, chosen in zip(examples, counted, strict=True)])
    return MicroBatch(
        input_ids=torch.from_numpy(ids.reshape(shape)),
        index=_joined([start + chosen for start, chosen in zip(starts, counted, strict=True)]),
        targets=targets,
        weights=torch.ones(len(targets)),
        sequence=_long(np.repeat(np.arange(len(examples)), [len(chosen) for chosen in counted])),
        ends=_long(starts + np.maximum(kept - 1, 0)),
        rows=torch.ones(len(rows)),
        tokens=int(lengths.sum()),
        values={name: torch.tensor([row.values[name] for row in rows]) for name in rows[0].values},
        each={name: _floats(examples, name) for name in examples[0].each},
        positions=_joined([np.arange(inputs) for inputs in kept]).view(shape) if packed else None,
    )


Place = tuple[tuple[int, int], NDArray[np.int64]]
"""Shape of the input, and where in it, flattened, each sequence starts."""


def _padded(kept: NDArray[np.int64]) -> Place:
    width = max(1, int(kept.max()))
    return (len(kept), width), np.arange(len(kept)) * width


def _packed(kept: NDArray[np.int64]) -> Place:
    return (1, int(kept.sum())), np.cumsum(kept) - kept


def dummy(row: TrainingRow, whole: bool = False, packed: bool = False) -> MicroBatch:
    """Keeps the collectives of a rank without rows in step: two real tokens of each example, weight 0."""
    examples = tuple(
        Example(
            each.tokens[[0, -1]], np.array([0, 1], dtype=np.uint8), {name: one[-1:] for name, one in each.each.items()}
        )
        for each in row.examples
    )
    micro = collate([TrainingRow(examples, row.values)], whole, packed)
    return replace(micro, weights=torch.zeros_like(micro.weights), rows=torch.zeros(1), tokens=0)


def _joined(parts: Sequence[NDArray[Any]]) -> Tensor:
    return _long(np.concatenate(parts))


def _floats(examples: Sequence[Example], name: str) -> Tensor:
    return torch.from_numpy(np.concatenate([example.each[name] for example in examples]).astype(np.float32))


def _long(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array, dtype=np.int64))
