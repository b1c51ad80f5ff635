"""From parsed rows to tokens and their mask: what the model sees and which tokens are counted.

Called by `build` with batches of rows. Rules that the stages stand on (each is a property test):
- the tokens of the prompt alone are a prefix of the tokens of prompt and response, else the row is refused: a mask
  cut at another place would count the prompt or miss the answer;
- the stop token is the last token of a response and counted, once: else the model never learns to stop;
- with loss on every assistant turn, the template's own markers say where each answer is: one stretch per answer, each
  up to its stop token, and what came before an answer is what a model would be given there;
- both answers of a pair stand after the same tokens;
- a prompt alone is what an answer would stand after, and nothing of it is counted;
- nothing is invented: what the limits do to a sequence is in fit.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jinja2
import numpy as np

from posttrain_trainer.data.fit import Encoded, Ids, Limits, Marked, answered, document, fit, fit_pair, fit_prompt
from posttrain_trainer.data.messages import Message, RowRefused, require_unicode
from posttrain_trainer.data.rows import Chat, Comparison, Pair, Parsed, Prompt, Text
from posttrain_trainer.data.schema import LossOn
from posttrain_trainer.data.vocabulary import Vocabulary, runs


@dataclass(frozen=True)
class _Texts:
    """A sequence as the strings to encode; `prompt` None where there is no response to set apart. `turns`: loss on
    every assistant turn of them; `open`: something is to follow."""

    full: str
    prompt: str | None = None
    response: str | None = None
    chat: bool = False
    turns: tuple[Message, ...] = ()
    open: bool = False


class Tokeniser:
    """Encodes rows in batches. Knows one tokenizer, one limit and what the loss is on."""

    def __init__(self, vocabulary: Vocabulary, limits: Limits, loss_on: LossOn) -> None:
        self._vocabulary = vocabulary
        self.limits = limits
        self._loss_on = loss_on

    def encode(self, rows: Sequence[Parsed]) -> list[Encoded | RowRefused]:
        """One outcome per row, in order. A refusal is a value here: one bad row stops no batch."""
        texts = [self._render(row) for row in rows]
        flat = [text for some in texts if not isinstance(some, RowRefused) for text in some]
        marked = iter(self._mark(flat))
        outcomes: list[Encoded | RowRefused] = []
        for row, some in zip(rows, texts, strict=True):
            outcomes.append(
                some if isinstance(some, RowRefused) else self._fit(row, list(itertools.islice(marked, len(some))))
            )
        return outcomes

    def _render(self, row: Parsed) -> list[_Texts] | RowRefused:
        sequences = (row.chosen, row.rejected) if isinstance(row, Comparison) else (row,)
        try:
            texts = [self._texts(sequence) for sequence in sequences]
            for text in texts:
                require_unicode(text.full, "the row")
            return texts
        except RowRefused as refusal:
            return refusal
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            # Templates call raise_exception, and fail on fields that they expect: all of it is about this row.
            return RowRefused("TemplateError", f"the chat template fails on this row: {error}")

    def _texts(self, row: Text | Pair | Chat | Prompt) -> _Texts:
        if isinstance(row, Prompt):
            return self._open(row)
        if isinstance(row, Text):
            return _Texts(row.text)
        if isinstance(row, Pair):
            return _Texts(row.prompt + row.completion, row.prompt, row.completion)
        render = self._vocabulary.render
        if row.answer is None and self._loss_on == "Assistant":
            return self._turns(row.prompt)
        if row.answer is None:
            return _Texts(render(row.prompt, generation=False), chat=True)
        full = render((*row.prompt, row.answer), generation=False)
        return _Texts(full, render(row.prompt, generation=True), chat=True)

    def _open(self, row: Prompt) -> _Texts:
        if isinstance(row.content, str):
            return _Texts(row.content, open=True)
        return _Texts(self._vocabulary.render(row.content, generation=True), chat=True, open=True)

    def _turns(self, turns: tuple[Message, ...]) -> _Texts:
        """RowRefused(PromptNotPrefix) where the template changes what stood before an answer once the answer is there:
        of all answers here by their text, of the last one by its tokens too."""
        vocabulary, prompt = self._vocabulary, ""
        full = vocabulary.render(turns, generation=False)
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant" or index == 0:
                continue
            prompt = vocabulary.render(turns[:index], generation=True)
            if not full.startswith(prompt):
                before, whole = vocabulary.ids([prompt, full], specials=False)
                require_prefix(before, whole, vocabulary.decode)
        return _Texts(full, prompt, chat=True, turns=turns)

    def _mark(self, texts: list[_Texts]) -> list[Marked | RowRefused]:
        fulls = self._ids([text.full for text in texts], texts)
        prompts = self._ids([text.prompt or "" for text in texts], texts)
        outcomes: list[Marked | RowRefused] = []
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

    def _assemble(self, text: _Texts, full: Ids, prompt: Ids) -> Marked:
        if text.turns:
            return self._assistant(text, full, prompt)
        if text.open:
            whole = full if text.chat else self._vocabulary.opened(full)
            self._vocabulary.refuse_double_bos(whole)
            return Marked(whole, np.zeros(len(whole), dtype=np.uint8), prompt=len(whole))
        if text.prompt is None:
            whole = full if text.chat else self._vocabulary.closed(full)
            self._vocabulary.refuse_double_bos(whole)
            return document(whole)
        prompt, response = self._chat(full, prompt) if text.chat else self._pair(text, full, prompt)
        self._vocabulary.refuse_double_bos(prompt + response)
        return answered(prompt, response, everything=self._loss_on == "All")

    def _chat(self, full: Ids, prompt: Ids) -> tuple[Ids, Ids]:
        require_prefix(prompt, full, self._vocabulary.decode)
        return prompt, end_response(full[len(prompt) :], self._vocabulary.stop)

    def _assistant(self, text: _Texts, full: Ids, prompt: Ids) -> Marked:
        vocabulary, answers = self._vocabulary, sum(turn["role"] == "assistant" for turn in text.turns)
        require_prefix(prompt, full, vocabulary.decode)
        vocabulary.refuse_double_bos(full)
        tokens, marked = vocabulary.assistant_mask(text.turns)
        mask, found = np.zeros(len(tokens), dtype=np.uint8), runs(marked)
        if len(found) != answers:
            raise RowRefused(
                "AnswersNotMarked", f"the chat template marks {len(found)} stretches of {answers} assistant messages"
            )
        for start, stop in found:
            mask[start : start + len(end_response(tokens[start:stop], vocabulary.stop))] = 1
        return Marked(tokens, mask, prompt=0)

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

    def _fit(self, row: Parsed, marked: list[Marked | RowRefused]) -> Encoded | RowRefused:
        good = [each for each in marked if isinstance(each, Marked)]
        if len(good) < len(marked):
            return next(each for each in marked if isinstance(each, RowRefused))
        try:
            if isinstance(row, Comparison):
                return fit_pair(good[0], good[1], self.limits, row.margin)
            if isinstance(row, Prompt):
                return fit_prompt(good[0].tokens, self.limits, self._vocabulary.bos, row.record)
            return fit(good[0], self.limits)
        except RowRefused as refusal:
            return refusal


def require_prefix(prompt: Ids, full: Ids, decode: Callable[[Sequence[int]], str]) -> None:
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
