"""Encoded rows within the limits: whole, cut, split into windows, or refused as too long.

Called by `tokenise` with the tokens of a row, their mask and the length of the prompt. Nothing is invented: what was
cut off ends without a stop token. A document that is split overlaps by one token, so that each of its targets is
counted exactly once. A prompt that is cut keeps its end, where the question is. Too long is no bad row: it is counted
apart and has a limit of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from posttrain_trainer.data.messages import RowRefused
from posttrain_trainer.tokenset import Example, TrainingRow

TooLongPolicy = Literal["Skip", "Split", "Truncate", "Fail"]
TOO_LONG = "TooLong"
IDENTICAL = "IdenticalPair"

Ids = list[int]


@dataclass(frozen=True)
class Encoded:
    """What one row of the data is trained on as (several rows where a document was split); `cut`: something was
    truncated away."""

    rows: tuple[TrainingRow, ...]
    cut: bool = False


@dataclass(frozen=True)
class Limits:
    """`max_length` in tokens, of the prompt alone too where `max_prompt_length` is set, and what happens to what is
    longer. `source`: where `max_length` comes from, `advice`: how it is raised; for messages."""

    max_length: int
    too_long: TooLongPolicy
    max_prompt_length: int | None = None
    source: str = "data.maxLength, or the model's positions"
    advice: str = "Raise data.maxLength"


@dataclass(frozen=True)
class Marked:
    """The tokens of a sequence; mask uint8 [T], 1 where tokens[t] is counted; `prompt`: tokens of the prompt, None of
    a document."""

    tokens: Ids
    mask: NDArray[np.uint8]
    prompt: int | None = None


def document(tokens: Ids) -> Marked:
    """All tokens but the first are targets."""
    return Marked(tokens, _mask(len(tokens), 1))


def answered(prompt: Ids, response: Ids, everything: bool = False) -> Marked:
    """The response counts; `everything`: the prompt too."""
    count = len(prompt)
    return Marked(prompt + response, _mask(count + len(response), 1 if everything else max(1, count)), count)


def fit(marked: Marked, limits: Limits) -> Encoded:
    """RowRefused(TooLong) where it is too long and the limits say no other."""
    if marked.prompt is None:
        return fit_document(marked.tokens, limits)
    example, cut = _fit_one(marked, limits)
    return Encoded((TrainingRow((example,), {}),), cut)


def fit_pair(chosen: Marked, rejected: Marked, limits: Limits, margin: float | None) -> Encoded:
    """One row of two examples. Split is for documents: a pair is skipped instead. IdenticalPair where both have the
    same tokens: their difference is always 0, and they would teach nothing (loss log 2, no gradient)."""
    examples, cuts = zip(*(_fit_one(each, limits) for each in (chosen, rejected)), strict=True)
    if np.array_equal(examples[0].tokens, examples[1].tokens):
        what = "are the same once cut to the limit" if any(cuts) else "are the same answer"
        raise RowRefused(IDENTICAL, f"chosen and rejected {what}: there is nothing to prefer")
    return Encoded((TrainingRow(tuple(examples), {} if margin is None else {"margin": margin}),), any(cuts))


def _fit_one(marked: Marked, limits: Limits) -> tuple[Example, bool]:
    count, prompt = len(marked.tokens), marked.prompt or 0
    if limits.max_prompt_length is not None and prompt > limits.max_prompt_length:
        raise RowRefused(
            TOO_LONG, f"the prompt has {prompt} tokens, the limit is {limits.max_prompt_length} (data.maxPromptLength)"
        )
    if count <= limits.max_length:
        _require_counted(marked.mask)
        return _example(marked.tokens, marked.mask), False
    if limits.too_long != "Truncate":
        raise _too_long(count, limits)
    kept = marked.mask[: limits.max_length]
    if not kept.any():
        raise RowRefused(
            TOO_LONG, f"the prompt alone has {prompt} tokens, the limit is {limits.max_length}: nothing to learn"
        )
    return _example(marked.tokens[: limits.max_length], kept), True


def fit_prompt(tokens: Ids, limits: Limits, bos: int | None, record: str) -> Encoded:
    """A prompt of at most `max_length` tokens, none of them counted. Truncate: the first token where it is BOS, and the
    last ones. Split is for documents: such a prompt is skipped instead."""
    if not tokens or tokens == [bos]:
        raise RowRefused("EmptyPrompt", "the tokenizer makes nothing of prompt: there is nothing to answer")
    cut = len(tokens) > limits.max_length
    if cut and limits.too_long != "Truncate":
        raise _too_long(len(tokens), limits)
    first = tokens[:1] if cut and tokens[0] == bos and limits.max_length > 1 else []
    kept = [*first, *tokens[len(first) - limits.max_length :]] if cut else tokens
    example = _example(kept, np.zeros(len(kept), dtype=np.uint8))
    return Encoded((TrainingRow((example,), {}, record),), cut)


def fit_document(tokens: Ids, limits: Limits) -> Encoded:
    """All tokens but the first are targets. Split: windows that overlap by one token, so each is a target once."""
    length = limits.max_length
    if len(tokens) <= length:
        _require_counted(_mask(len(tokens), 1))
        return _documents([tokens])
    if limits.too_long == "Truncate":
        return _documents([tokens[:length]], cut=True)
    if limits.too_long != "Split":
        raise _too_long(len(tokens), limits)
    return _documents(_windows(tokens, length))


def _windows(tokens: Ids, length: int) -> Iterator[Ids]:
    return (tokens[start : start + length] for start in range(0, len(tokens) - 1, length - 1))


def _documents(windows: Sequence[Ids] | Iterator[Ids], cut: bool = False) -> Encoded:
    examples = (_example(window, _mask(len(window), 1)) for window in windows)
    return Encoded(tuple(TrainingRow((example,), {}) for example in examples), cut)


def _mask(length: int, start: int) -> NDArray[np.uint8]:
    mask = np.zeros(length, dtype=np.uint8)
    mask[start:] = 1
    return mask


def _example(tokens: Ids, mask: NDArray[np.uint8]) -> Example:
    return Example(np.asarray(tokens, dtype=np.int32), mask)


def _require_counted(mask: NDArray[np.uint8]) -> None:
    """A tokenizer may make nothing of a text that is not empty: of spaces without width, of control characters."""
    if not mask.any():
        raise RowRefused(
            "NothingCounted",
            f"{len(mask)} tokens and none of them is counted: the tokenizer makes nothing of the text to be learned",
        )


def _too_long(count: int, limits: Limits) -> RowRefused:
    return RowRefused(TOO_LONG, f"{count} tokens, the limit is {limits.max_length} ({limits.source})")
