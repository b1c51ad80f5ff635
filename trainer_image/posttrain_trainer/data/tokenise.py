"""From a parsed row to tokens and their mask: what the model sees and which tokens are counted.

Rules that the stages stand on (each is a property test):
- the tokens of the prompt alone are a prefix of the tokens of prompt and response, else the row is refused: a mask
  cut at another place would count the prompt or miss the answer;
- the stop token is the last token of a response and counted, once: else the model never learns to stop;
- nothing is invented: a text that was cut off ends without a stop token;
- a document longer than the limit is split with one token of overlap, so that each of its targets is counted exactly
  once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import numpy as np
from numpy.typing import NDArray

from posttrain_trainer.data.rows import LossOn, Pair, Parsed, RowRefused, Text, require_unicode
from posttrain_trainer.data.vocabulary import Vocabulary
from posttrain_trainer.tokenset import Example, TrainingRow

TooLongPolicy = Literal["Skip", "Split", "Truncate", "Fail"]
TOO_LONG = "TooLong"

Ids = list[int]


@dataclass(frozen=True)
class Encoded:
    """What one row of the data is trained on as (several rows where a document was split); `cut`: something was
    truncated away."""

    rows: tuple[TrainingRow, ...]
    cut: bool = False


@dataclass(frozen=True)
class Limits:
    """`max_length` in tokens, and what happens to what is longer."""

    max_length: int
    too_long: TooLongPolicy


@dataclass(frozen=True)
class _Texts:
    """A row as the strings to encode; `prompt` None where there is no response to set apart."""

    full: str
    prompt: str | None = None
    response: str | None = None
    chat: bool = False


class Tokeniser:
    """Encodes rows in batches. Knows one tokenizer, one limit and what the loss is on."""

    def __init__(self, vocabulary: Vocabulary, limits: Limits, loss_on: LossOn) -> None:
        self._vocabulary = vocabulary
        self._limits = limits
        self._all = loss_on == "All"

    def encode(self, rows: Sequence[Parsed]) -> list[Encoded | RowRefused]:
        """One outcome per row, in order. A refusal is a value here: one bad row stops no batch."""
        texts = [self._render(row) for row in rows]
        good = [text for text in texts if isinstance(text, _Texts)]
        encoded = iter(self._encode(good))
        return [text if isinstance(text, RowRefused) else next(encoded) for text in texts]

    def _render(self, row: Parsed) -> _Texts | RowRefused:
        try:
            texts = self._texts(row)
            require_unicode(texts.full, "the row")
            return texts
        except RowRefused as refusal:
            return refusal
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            # Templates call raise_exception, and fail on fields that they expect: all of it is about this row.
            return RowRefused("TemplateError", f"the chat template fails on this row: {error}")

    def _texts(self, row: Parsed) -> _Texts:
        if isinstance(row, Text):
            return _Texts(row.text)
        if isinstance(row, Pair):
            return _Texts(row.prompt + row.completion, row.prompt, row.completion)
        render = self._vocabulary.render
        if row.answer is None:
            return _Texts(render(row.prompt, generation=False), chat=True)
        full = render((*row.prompt, row.answer), generation=False)
        return _Texts(full, render(row.prompt, generation=True), chat=True)

    def _encode(self, texts: list[_Texts]) -> list[Encoded | RowRefused]:
        fulls = self._ids([text.full for text in texts], texts)
        prompts = self._ids([text.prompt or "" for text in texts], texts)
        outcomes: list[Encoded | RowRefused] = []
        for text, full, prompt in zip(texts, fulls, prompts, strict=True):
            try:
                outcomes.append(self._assemble(text, full, prompt))
            except RowRefused as refusal:
                outcomes.append(refusal)
        return outcomes

    def _ids(self, strings: list[str], texts: list[_Texts]) -> list[Ids]:
        """Templates write their special tokens themselves; for plain strings the tokenizer adds them."""
        found: dict[int, Ids] = {}
        for chat in (True, False):
            chosen = [index for index, text in enumerate(texts) if text.chat is chat]
            ids = self._vocabulary.ids([strings[index] for index in chosen], specials=not chat)
            found.update(zip(chosen, ids, strict=True))
        return [found[index] for index in range(len(texts))]

    def _assemble(self, text: _Texts, full: Ids, prompt: Ids) -> Encoded:
        if text.prompt is None:
            whole = full if text.chat else self._vocabulary.closed(full)
            self._vocabulary.refuse_double_bos(whole)
            return fit_document(whole, self._limits)
        prompt, response = self._chat(full, prompt) if text.chat else self._pair(text, full, prompt)
        self._vocabulary.refuse_double_bos(prompt + response)
        return fit_response(prompt + response, 1 if self._all else len(prompt), self._limits)

    def _chat(self, full: Ids, prompt: Ids) -> tuple[Ids, Ids]:
        require_prefix(prompt, full, self._vocabulary.decode)
        return prompt, end_response(full[len(prompt) :], self._vocabulary.stop)

    def _pair(self, text: _Texts, full: Ids, prompt: Ids) -> tuple[Ids, Ids]:
        """Encoded together where the prompt's tokens stay a prefix, as a prompt alone is what the model will be given.

        Where the tokenizer joins the last letters of the prompt with the first of the response, the two are encoded
        apart, if that spells the same text.
        """
        vocabulary = self._vocabulary
        prompt, full = vocabulary.opened(prompt), vocabulary.opened(full)
        if full[: len(prompt)] != prompt:
            apart = prompt + vocabulary.opened(vocabulary.ids([text.response or ""], specials=False)[0])
            if vocabulary.decode(apart) != vocabulary.decode(full):
                require_prefix(prompt, full, vocabulary.decode)
            full = apart
        return prompt, end_response(vocabulary.closed(full[len(prompt) :]), vocabulary.eos)


def require_prefix(prompt: Ids, full: Ids, decode: Any) -> None:
    """RowRefused where the prompt's tokens do not begin the whole; the detail shows where they part."""
    if full[: len(prompt)] == prompt:
        return
    same = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    raise RowRefused(
        "PromptNotPrefix",
        f"the tokens of the prompt are no prefix of those of prompt and response: at token {same} the prompt goes on "
        "with "
        f"{decode(prompt[same : same + 8])!r}, the whole with {decode(full[same : same + 8])!r}. "
        "Use a chat template that leaves earlier text unchanged (model.chatTemplate)",
    )


def end_response(response: Ids, stop: int) -> Ids:
    """The response up to its stop token, which must be there once. What a template writes after it is dropped."""
    count = response.count(stop)
    if count == 0:
        raise RowRefused(
            "StopTokenMissing", f"the response has no stop token (id {stop}): the model would not learn to stop"
        )
    if count > 1:
        raise RowRefused("StopTokenInside", f"the response has its stop token (id {stop}) {count} times: text after it")
    return response[: response.index(stop) + 1]


def fit_response(tokens: Ids, start: int, limits: Limits) -> Encoded:
    """Tokens with loss from `start` on, within the limit. Split is for documents: a response is skipped instead."""
    mask = np.zeros(len(tokens), dtype=np.uint8)
    mask[max(1, start) :] = 1
    if len(tokens) <= limits.max_length:
        return Encoded((_row(tokens, mask),))
    if limits.too_long != "Truncate":
        raise _too_long(len(tokens), limits)
    kept = mask[: limits.max_length]
    if not kept.any():
        raise RowRefused(
            TOO_LONG, f"the prompt alone has {start} tokens, the limit is {limits.max_length}: nothing to learn"
        )
    return Encoded((_row(tokens[: limits.max_length], kept),), cut=True)


def fit_document(tokens: Ids, limits: Limits) -> Encoded:
    """All tokens but the first are targets. Split: windows that overlap by one token, so each is a target once."""
    length = limits.max_length
    if len(tokens) <= length:
        return Encoded((_row(tokens, _document_mask(len(tokens))),))
    if limits.too_long == "Truncate":
        return Encoded((_row(tokens[:length], _document_mask(length)),), cut=True)
    if limits.too_long != "Split":
        raise _too_long(len(tokens), limits)
    windows = [tokens[start : start + length] for start in range(0, len(tokens) - 1, length - 1)]
    return Encoded(tuple(_row(window, _document_mask(len(window))) for window in windows))


def _document_mask(length: int) -> NDArray[np.uint8]:
    mask = np.ones(length, dtype=np.uint8)
    mask[:1] = 0
    return mask


def _row(tokens: Ids, mask: NDArray[np.uint8]) -> TrainingRow:
    return TrainingRow((Example(np.asarray(tokens, dtype=np.int32), mask),), {})


def _too_long(count: int, limits: Limits) -> RowRefused:
    return RowRefused(
        TOO_LONG, f"{count} tokens, the limit is {limits.max_length} (data.maxLength, or the model's positions)"
    )
