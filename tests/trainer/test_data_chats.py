"""Rows of other formats (Alpaca, ShareGPT), and loss on every assistant turn by a template's generation markers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_kit import chats, model_folder, sft, small_tokenizer

from posttrain_api.reasons import Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.data.fit import Encoded, Limits
from posttrain_trainer.data.messages import RowRefused
from posttrain_trainer.data.rows import Chat, Pair, parse_row
from posttrain_trainer.data.schema import Kind, allowed_kinds, choose_kind
from posttrain_trainer.data.tokenise import Tokeniser
from posttrain_trainer.data.vocabulary import Vocabulary
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.prepare import prepare
from posttrain_trainer.tokenset import TokenSet

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
BEGIN, END = "{% for m in messages %}", "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
HEADER = "{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
UNMARKED_STOP = (
    BEGIN + HEADER + "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}" + END
)
UNMARKED = BEGIN + "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}" + END
NEWLINE_INSIDE = (
    BEGIN + HEADER + "{% generation %}{{ m['content'] + eos_token + '\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}" + END
)
FORGETFUL = (
    BEGIN + "{% if m['role'] == 'user' %}{{ '<|user|>' + (m['content'] if loop.index > messages | length - 2 else '') "
    "+ eos_token }}{% else %}{{ '<|assistant|>' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% endif %}" + END
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


@cache
def vocabulary(template: str | None = None) -> Vocabulary:
    tokenizer = small_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    made = Vocabulary(tokenizer, "pvc://m/x")
    made.require_chat()
    return made


def test_alpaca_has_its_own_prompt() -> None:
    row = {"instruction": "Add {x}.", "input": "1 and 2", "output": "3"}
    parsed = parse_row(row, Kind.ALPACA, {}, "Auto")
    assert parsed == Pair(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Input:\n1 and 2\n\n### Response:",
        "3",
    )
    without = Pair(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {x}.\n\n### Response:",
        "3",
    )
    for empty in ("", None):
        assert parse_row({**row, "input": empty}, Kind.ALPACA, {}, "Auto") == without
    mapped = {"instruction": "Add {x}.", "context": "1 and 2", "output": "3"}
    assert parse_row(mapped, Kind.ALPACA, {"input": "context"}, "Auto") == parsed


def test_sharegpt_is_a_chat() -> None:
    turns = {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}
    assert parse_row(turns, Kind.SHAREGPT, {}, "Auto") == Chat(({"role": "system", "content": "s"}, USER), ANSWER)


@pytest.mark.parametrize(
    ("values", "kind", "part"),
    [
        ({"conversations": [{"from": "tool", "value": "x"}]}, Kind.SHAREGPT, "from must be one of human, user, gpt"),
        ({"conversations": [{"from": "human"}]}, Kind.SHAREGPT, "conversations[0].value must be a string"),
        ({"conversations": [USER]}, Kind.SHAREGPT, "map data.train[].columns: {messages: <column>}"),
        ({"conversations": [3]}, Kind.SHAREGPT, "an object with from and value, it is int 3"),
        ({"instruction": "a", "output": "b", "input": 3}, Kind.ALPACA, "input must be a string, it is int 3"),
    ],
)
def test_bad_rows_say_why(values: dict[str, Any], kind: Kind, part: str) -> None:
    with pytest.raises(RowRefused) as caught:
        parse_row(values, kind, {}, "Auto")
    assert caught.value.reason == "WrongType"
    assert part in caught.value.detail


def test_kinds_by_their_columns() -> None:
    kinds = allowed_kinds("SFT", "Auto")
    assert choose_kind("u", {"instruction", "input", "output"}, {}, kinds) is Kind.ALPACA
    assert choose_kind("u", {"conversations", "id"}, {}, kinds) is Kind.SHAREGPT
    assert choose_kind("u", {"turns"}, {"conversations": "turns"}, kinds) is Kind.SHAREGPT
    assert choose_kind("u", {"conversations"}, {"messages": "conversations"}, kinds) is Kind.MESSAGES
    with pytest.raises(TrainerFailure, match=r"needs the columns \(messages\) or \(conversations\)"):
        choose_kind("u", {"prompt", "completion"}, {}, allowed_kinds("SFT", "Assistant"))


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="<|"), min_size=1, max_size=12)


@settings(max_examples=60)
@given(st.sampled_from([None, NEWLINE_INSIDE]), st.lists(PLAIN, min_size=2, max_size=6))
def test_every_answer_counts_up_to_its_stop_token_and_nothing_else(template: str | None, texts: list[str]) -> None:
    words = vocabulary(template)
    texts = texts[: len(texts) // 2 * 2]
    texts = [text if text.strip() else "x" for text in texts]
    turns = tuple({**(USER, ANSWER)[i % 2], "content": text} for i, text in enumerate(texts))
    (outcome,) = Tokeniser(words, Limits(2000, "Skip"), "Assistant").encode([Chat(turns, None)])
    assert isinstance(outcome, Encoded), outcome
    (example,) = outcome.rows[0].examples
    counted = words.decode(example.tokens[example.mask == 1].tolist())
    assert counted == "".join(text + "<|endoftext|>" for text in texts[1::2])
    assert words.decode(example.tokens.tolist()) == words.render(turns, generation=False)


@pytest.mark.parametrize(
    ("template", "part"),
    [
        (UNMARKED, "has no {% generation %} markers"),
        (UNMARKED_STOP, "marks ['Answer 2', 'Answer 4'] of two answers: each must be marked, with its stop token"),
    ],
)
def test_templates_that_mark_no_answers(template: str, part: str) -> None:
    with pytest.raises(TrainerFailure) as caught:
        vocabulary(template).require_markers()
    assert caught.value.reason is Reason.MODEL_INCOMPATIBLE
    for each in ("pvc://m/x", part, "model.chatTemplate", "data.lossOn: Completion"):
        assert each in caught.value.message


def encode(template: str | None, turns: list[dict[str, str]]) -> Encoded | RowRefused:
    return Tokeniser(vocabulary(template), Limits(500, "Skip"), "Assistant").encode([Chat(tuple(turns), None)])[0]


def test_what_was_said_before_an_answer_must_stay() -> None:
    vocabulary(FORGETFUL).require_markers()
    assert isinstance(encode(FORGETFUL, [USER, ANSWER]), Encoded)
    refused = encode(FORGETFUL, [USER, ANSWER, USER, ANSWER])
    assert isinstance(refused, RowRefused)
    assert refused.reason == "PromptNotPrefix"


def test_an_answer_that_has_the_stop_token_inside() -> None:
    refused = encode(None, [USER, {**ANSWER, "content": "a<|endoftext|>b"}, USER, ANSWER])
    assert isinstance(refused, RowRefused)
    assert refused.reason == "StopTokenInside"


def assistant(tmp_path: Path, model: Path, rows: list[Any], template: str | None = None) -> TrainerConfig:
    config = sft(tmp_path, model, rows, data={"loss_on": "Assistant"})
    if template is None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"chat_template": template})})


def test_prepare_with_loss_on_assistant(tmp_path: Path, model: Path) -> None:
    rows = [{"messages": row["messages"] * 2} for row in chats(5)]
    prepared = prepare(assistant(tmp_path, model, rows))
    (example,) = TokenSet(Path(prepared.train_dir))[0].examples
    assert (example.tokens[example.mask == 1] == 0).sum() == 2  # the EOS of this tokenizer
    shown = (Path(prepared.train_dir).parent / "preflight.txt").read_text()
    assert "chat template: an answer ends with '<|endoftext|>'" in shown
    assert "stop 4 (2 counted)" in shown


def test_prepare_refuses_a_template_without_markers(tmp_path: Path, model: Path) -> None:
    with pytest.raises(TrainerFailure, match="markers") as caught:
        prepare(assistant(tmp_path, model, chats(3), UNMARKED))
    assert caught.value.reason is Reason.MODEL_INCOMPATIBLE
