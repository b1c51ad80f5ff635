"""Tokens and masks: the rules of the module, on a real tokenizer trained here and on rows that hypothesis makes up."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_kit import small_tokenizer

from posttrain_api.reasons import Reason
from posttrain_trainer.data.fit import TOO_LONG, Encoded, Limits, TooLongPolicy, fit_document
from posttrain_trainer.data.messages import RowRefused
from posttrain_trainer.data.rows import Chat, Comparison, Pair, Parsed, Text
from posttrain_trainer.data.schema import LossOn
from posttrain_trainer.data.tokenise import Tokeniser
from posttrain_trainer.data.vocabulary import Vocabulary
from posttrain_trainer.errors import TrainerFailure

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIPPING = (
    "{% for m in messages %}{{ m['role'] + ':' }}"
    "{{ (m['content'] if loop.last else m['content'] | upper) + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
NO_STOP = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}"


@cache
def vocabulary(template: str | None = None, pad_is_eos: bool = False) -> Vocabulary:
    tokenizer = small_tokenizer()
    if template is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = template
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    made = Vocabulary(tokenizer, "test")
    made.require_chat()
    return made


def encode(
    row: Parsed, words: Vocabulary, length: int = 512, policy: TooLongPolicy = "Skip", loss_on: LossOn = "Auto"
) -> Encoded | RowRefused:
    return Tokeniser(words, Limits(length, policy), loss_on).encode([row])[0]


def one(outcome: Encoded | RowRefused) -> tuple[list[int], list[int]]:
    assert isinstance(outcome, Encoded), outcome
    ((example,),) = (row.examples for row in outcome.rows)
    return example.tokens.tolist(), example.mask.tolist()


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="<|"), min_size=1, max_size=30)


@settings(max_examples=150)
@given(PLAIN, PLAIN)
def test_pair_prompt_is_a_prefix_and_the_rest_is_counted(prompt: str, completion: str) -> None:
    words = vocabulary()
    tokens, mask = one(encode(Pair(prompt, completion), words))
    start = mask.index(1)
    assert tokens[:start] == words.ids([prompt], specials=True)[0]
    assert mask == [0] * start + [1] * (len(tokens) - start)
    assert words.decode(tokens[start:-1]) == completion
    assert tokens[-1] == words.eos
    assert tokens.count(words.eos) == 1


@settings(max_examples=150)
@given(st.sampled_from([None, CHATML]), st.lists(PLAIN, min_size=1, max_size=4), PLAIN)
def test_chat_prompt_is_a_prefix_and_the_last_answer_is_counted(
    template: str | None, turns: list[str], last: str
) -> None:
    words = vocabulary(template)
    prompt = tuple(user(text) if index % 2 == 0 else answer(text) for index, text in enumerate(turns))
    tokens, mask = one(encode(Chat(prompt, answer(last)), words))
    start = mask.index(1)
    assert tokens[:start] == words.ids([words.render(prompt, generation=True)], specials=False)[0]
    assert words.decode(tokens[start:-1]) == last
    assert tokens[-1] == words.stop
    assert tokens[start:].count(words.stop) == 1
    assert sum(mask) == len(tokens) - start


def test_stop_token_is_the_templates_own() -> None:
    words = vocabulary(CHATML)
    assert words.decode([words.stop]) == "<|im_end|>"
    assert words.stop != words.eos


@pytest.mark.parametrize("row", [Text("\u200b"), Pair("", "\u200b"), Comparison(Pair("", "a"), Pair("", "\u200b"))])
def test_a_text_without_tokens_is_refused(row: Parsed) -> None:
    """It would be a sequence of EOS alone, with nothing to learn, and an empty line where sequences are packed."""
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    refused = encode(row, Vocabulary(tokenizer, "test"))
    assert isinstance(refused, RowRefused)
    assert refused.reason == "NothingCounted"
    assert "1 tokens and none of them is counted" in refused.detail


def test_pad_equal_to_eos_still_learns_eos() -> None:
    words = vocabulary(pad_is_eos=True)
    for row in (Pair("what", "this"), Chat((user("what"),), answer("this"))):
        tokens, mask = one(encode(row, words))
        assert (tokens[-1], mask[-1]) == (words.eos, 1)


@given(st.integers(2, 60), st.integers(2, 20))
def test_split_counts_every_target_once(count: int, length: int) -> None:
    tokens = list(range(count))
    windows = [row.examples[0] for row in fit_document(tokens, Limits(length, "Split")).rows]
    targets = [int(t) for window in windows for t, counted in zip(window.tokens, window.mask, strict=True) if counted]
    assert targets == tokens[1:]
    assert all(len(window.tokens) <= length and not window.mask[0] for window in windows)
    assert all(window.mask.sum() for window in windows)


def test_document_ends_with_one_eos() -> None:
    words = vocabulary()
    for text in ("one two", "one two<|endoftext|>"):
        tokens, mask = one(encode(Text(text), words))
        assert tokens.count(words.eos) == 1
        assert tokens[-1] == words.eos
        assert mask == [0] + [1] * (len(tokens) - 1)


@pytest.mark.parametrize(
    "row", [Text("one two three four"), Pair("one", " two three four"), Chat((user("a"),), answer("bcdefgh"))]
)
def test_truncation_invents_no_eos(row: Parsed) -> None:
    words = vocabulary()
    whole, _ = one(encode(row, words))
    cut = encode(row, words, length=len(whole) - 1, policy="Truncate")
    tokens, mask = one(cut)
    assert isinstance(cut, Encoded)
    assert cut.cut
    assert tokens == whole[:-1]
    assert words.eos not in tokens[mask.index(1) :]


def test_too_long() -> None:
    words = vocabulary()
    for policy in ("Skip", "Fail"):
        refused = encode(Text("one two three"), words, length=2, policy=policy)
        assert isinstance(refused, RowRefused)
        assert refused.reason == TOO_LONG
        assert "the limit is 2" in refused.detail
    nothing = encode(Pair("one two three four five", "six"), words, length=3, policy="Truncate")
    assert isinstance(nothing, RowRefused)
    assert "nothing to learn" in nothing.detail


def test_loss_on_all() -> None:
    for row in (Pair("one", " two"), Chat((user("one"), answer("two")), None), Text("one")):
        tokens, mask = one(encode(row, vocabulary(), loss_on="All"))
        assert mask == [0] + [1] * (len(tokens) - 1)


def test_template_whose_prompt_is_no_prefix() -> None:
    """As templates do that change earlier turns (Qwen3 drops the thoughts of all turns but the last)."""
    words = vocabulary(STRIPPING)
    refused = encode(Chat((user("hello"), answer("Yes"), user("why")), answer("so")), words)
    assert isinstance(refused, RowRefused)
    assert refused.reason == "PromptNotPrefix"
    assert "why" in refused.detail
    assert "model.chatTemplate" in refused.detail


def test_stop_token_inside_an_answer() -> None:
    refused = encode(Chat((user("q"),), answer("a<|endoftext|>b")), vocabulary())
    assert isinstance(refused, RowRefused)
    assert refused.reason == "StopTokenInside"


def test_one_bad_row_stops_no_batch() -> None:
    raising = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    words = vocabulary(raising)
    rows = [Chat((user(text),), answer("yes")) for text in ("good", "bad", "good")]
    outcomes = Tokeniser(words, Limits(512, "Skip"), "Auto").encode(rows)
    assert [isinstance(outcome, Encoded) for outcome in outcomes] == [True, False, True]
    assert "not this" in str(outcomes[1])


def test_half_a_surrogate_pair_in_a_chat_is_refused() -> None:
    """No tokenizer takes it; `\\ud83d` alone is valid JSON."""
    words = vocabulary(CHATML)
    bad, good = Chat((user("a \ud83d"),), answer("b")), Chat((user("a"),), answer("b"))
    outcomes = Tokeniser(words, Limits(512, "Skip"), "Auto").encode([bad, good])
    assert isinstance(outcomes[0], RowRefused)
    assert outcomes[0].reason == "NotUnicode"
    assert isinstance(outcomes[1], Encoded)


def test_double_bos() -> None:
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    words = Vocabulary(tokenizer, "test")
    refused = encode(Text("<s><s>one"), words)
    assert isinstance(refused, RowRefused)
    assert refused.reason == "DoubleBOS"
    assert isinstance(encode(Text("<s>one"), words), Encoded)


@pytest.mark.parametrize(
    ("template", "part"), [(NO_STOP, "ends an answer with no special token"), ("", "no chat template")]
)
def test_template_lint(template: str, part: str) -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TrainerFailure, match=part) as caught:
        Vocabulary(tokenizer, "pvc://m/x").require_chat()
    assert caught.value.reason is Reason.MODEL_INCOMPATIBLE
    assert "model.chatTemplate" in caught.value.message


def test_no_eos() -> None:
    tokenizer = small_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TrainerFailure, match="no EOS token") as caught:
        Vocabulary(tokenizer, "pvc://m/x")
    assert caught.value.reason is Reason.MODEL_INCOMPATIBLE
    assert "tokenizer_config.json" in caught.value.message
