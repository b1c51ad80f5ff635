"""What the model will be taught, in the log, before it is: the first rows as tokens with their mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from posttrain_trainer.data.build import Sample
from posttrain_trainer.tokenset import Example

HEAD = 24
TAIL = 24


def table(samples: Sequence[Sample], decode: Callable[[Sequence[int]], str]) -> str:
    """One block per row; per token its position, `+` where it is counted, its id and its text."""
    return "\n".join(line for sample in samples for line in _block(sample, decode))


def _block(sample: Sample, decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    for example in sample.row.examples:
        yield f"{sample.place}: {len(example.tokens)} tokens, {int(example.mask.sum())} counted (+)"
        yield from _tokens(example, decode)


def _tokens(example: Example, decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    tokens, mask = example.tokens, example.mask
    count = len(tokens)
    for position in range(count):
        if HEAD <= position < count - TAIL:
            if position == HEAD:
                yield f"   … {count - HEAD - TAIL} tokens left out …"
            continue
        sign = "+" if mask[position] else " "
        token = int(tokens[position])
        yield f"  {position:6d} {sign} {token:7d} {decode([token])!r}"
