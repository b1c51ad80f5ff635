"""How many rows of each source an epoch has: the source's rows × its weight.

Called by `prepare`, which settles the steps from it, and by the feed of the loop; both must come to the same. A weight
is passes over the source per epoch: 2 shows each of its rows twice, 0.5 half of them, the other half in the next epoch
(sampler.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from posttrain_api.reasons import Reason
from posttrain_api.trainer import DataSource
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.sampler import Part


def parts_of(sources: Sequence[DataSource], rows: Sequence[int]) -> tuple[Part, ...]:
    """One part per source. NothingToLearn where a source that has rows gives none to an epoch, or all together do."""
    if len(sources) != len(rows):
        raise TrainerFailure(
            Reason.TRAINER_ERROR,
            f"the token set has {len(rows)} sources, data.train has {len(sources)}. Remove the prepared folder, so "
            "that it is made anew.",
        )
    parts = tuple(Part(count, round(count * source.weight)) for source, count in zip(sources, rows, strict=True))
    for index, (source, part) in enumerate(zip(sources, parts, strict=True)):
        if part.rows and not part.taken:
            raise TrainerFailure(
                Reason.NOTHING_TO_LEARN,
                f"data.train[{index}].weight is {source.weight:g}: of the {part.rows} rows of {source.uri} an epoch "
                f"would have none. Set it to at least {1 / part.rows:.2g}, or remove the source.",
            )
    return parts


def epoch_rows(parts: Sequence[Part]) -> int:
    """Rows of an epoch, repeats counted."""
    return sum(part.taken for part in parts)
