"""What the model will be taught, shown before it is: what the chat template does, and the first rows as tokens with
their mask.

Called by `prepare`, which puts it into the log and beside the token sets. It refuses nothing: what must not be is
refused where the rows and the template are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from posttrain_trainer.data.build import Sample
from posttrain_trainer.data.vocabulary import Vocabulary
from posttrain_trainer.tokenset import Example

HEAD = 24
TAIL = 24
SHOWN = 2000
"""Characters of a prompt and of its columns; the middle of longer ones is left out."""


def report(samples: Sequence[Sample], vocabulary: Vocabulary, chat: bool, stops: Sequence[int] = ()) -> str:
    """The whole of it, many lines. `stops`: tokens that end a completion, in stage RL."""
    blocks = (line for sample in samples for line in _block(sample, vocabulary))
    return "\n".join((*_lint(vocabulary, chat), *_rollouts(vocabulary, chat, stops), *blocks))


def _lint(vocabulary: Vocabulary, chat: bool) -> Iterator[str]:
    bos = "none" if vocabulary.bos is None else f"{vocabulary.decode([vocabulary.bos])!r} (id {vocabulary.bos})"
    yield f"BOS {bos}, EOS {vocabulary.decode([vocabulary.eos])!r} (id {vocabulary.eos})"
    if not chat:
        return
    yield f"chat template: an answer ends with {vocabulary.decode([vocabulary.stop])!r} (id {vocabulary.stop})"
    if vocabulary.rewrites_earlier_turns():
        yield "chat template: it changes earlier turns when later ones follow (rows where that matters are refused)"


def _rollouts(vocabulary: Vocabulary, chat: bool, stops: Sequence[int]) -> Iterator[str]:
    if stops:
        ends = ", ".join(f"{vocabulary.decode([token])!r} (id {token})" for token in stops)
        yield f"stop tokens: a completion ends with the first of {ends}, or at rollout.maxNewTokens"
    if stops and not chat and vocabulary.templated:
        yield "the prompts are texts: the model gets them without its chat template, which messages would go through"


def _block(sample: Sample, vocabulary: Vocabulary) -> Iterator[str]:
    for name, example in zip(_names(sample), sample.row.examples, strict=True):
        tokens, mask = example.tokens, example.mask
        marks = ", ".join(
            f"{sign} {int((tokens == token).sum())} ({int(mask[tokens == token].sum())} counted)"
            for sign, token in (("BOS", vocabulary.bos), ("EOS", vocabulary.eos), ("stop", vocabulary.stop))
            if token is not None
        )
        yield f"{sample.place}{name}: {len(tokens)} tokens, {int(mask.sum())} counted (+); {marks}"
        if sample.row.record is not None:
            yield f"  prompt: {_short(repr(vocabulary.decode(tokens.tolist())))}"
            yield f"  columns for the rewards: {_short(sample.row.record)}"
        yield from _tokens(example, vocabulary)


def _short(text: str) -> str:
    half = SHOWN // 2
    return text if len(text) <= SHOWN else f"{text[:half]} … {len(text) - SHOWN} characters left out … {text[-half:]}"


def _names(sample: Sample) -> tuple[str, ...]:
    return (" chosen", " rejected") if len(sample.row.examples) == 2 else ("",)


def _tokens(example: Example, vocabulary: Vocabulary) -> Iterator[str]:
    tokens, mask = example.tokens, example.mask
    count = len(tokens)
    for position in range(count):
        if HEAD <= position < count - TAIL:
            if position == HEAD:
                yield f"   … {count - HEAD - TAIL} tokens left out …"
            continue
        sign = "+" if mask[position] else " "
        token = int(tokens[position])
        yield f"  {position:6d} {sign} {token:7d} {vocabulary.decode([token])!r}"
