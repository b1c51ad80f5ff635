"""Pairs of a chosen and a rejected answer: from rows to token sets of two examples a row, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_kit import job, model_folder, model_source, small_tokenizer, source, write_jsonl

from posttrain_api.reasons import Reason
from posttrain_api.trainer import RewardModelConfig, TrainerConfig
from posttrain_trainer.data.fit import IDENTICAL, TOO_LONG, Encoded, Limits
from posttrain_trainer.data.messages import RowRefused
from posttrain_trainer.data.rows import Chat, Comparison, Pair, parse_row
from posttrain_trainer.data.schema import Kind, allowed_kinds, choose_kind
from posttrain_trainer.data.tokenise import Tokeniser
from posttrain_trainer.data.vocabulary import Vocabulary
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.prepare import prepare
from posttrain_trainer.tokenset import TokenSet, TrainingRow

SYSTEM = {"role": "system", "content": "s"}
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in [("user", "q"), ("assistant", "a"), ("assistant", "b")]
)
COMPARISON, CONVERSATIONS = Kind.COMPARISON, Kind.CONVERSATIONS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    made = Vocabulary(small_tokenizer(), "test")
    made.require_chat()
    return made


def rows(count: int) -> list[dict[str, Any]]:
    """Sums, right and wrong."""
    return [
        {"prompt": f"what is {i} plus {i}? ", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1} or so", "gap": i / 4}
        for i in range(count)
    ]


def pair_job(tmp_path: Path, model: Path, data_rows: list[Any], **fields: Any) -> TrainerConfig:
    """A preference job on these rows; `columns` of its one source."""
    train = write_jsonl(tmp_path / "data" / "train.jsonl", data_rows)
    sources = [source(train, columns=fields.pop("columns", {}))]
    return job(tmp_path, sources, **{"stage": "Preference", "model": model_source(model), **fields})


def failure_of(config: TrainerConfig) -> TrainerFailure:
    with pytest.raises(TrainerFailure) as caught:
        prepare(config)
    return caught.value


@pytest.mark.parametrize("stage", ["RewardModel", "Preference"])
def test_kinds(stage: str) -> None:
    kinds = allowed_kinds(stage, "Auto")
    assert choose_kind("u", {"prompt", "chosen", "rejected"}, {}, kinds) is COMPARISON
    assert choose_kind("u", {"chosen", "rejected"}, {}, kinds) is CONVERSATIONS
    with pytest.raises(TrainerFailure, match=r"columns: \{prompt: question, chosen: accepted, rejected: worse\}"):
        choose_kind("u", {"question", "accepted", "worse"}, {}, kinds)
    with pytest.raises(TrainerFailure, match=r"\(chosen, rejected\), found: prompt\. Set .*chosen: <column>"):
        choose_kind("u", {"prompt"}, {}, kinds)


def test_three_shapes_give_the_same_comparison() -> None:
    expected = Comparison(Chat((USER,), GOOD), Chat((USER,), BAD))
    whole = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
    apart = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    assert parse_row(apart, COMPARISON, {}, "Auto") == expected
    assert parse_row(whole, CONVERSATIONS, {}, "Auto") == expected
    assert parse_row({"prompt": "q", **whole}, COMPARISON, {}, "Auto") == expected
    assert parse_row({**apart, "prompt": "q"}, COMPARISON, {}, "Auto") == expected
    strings = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert parse_row(strings, COMPARISON, {}, "Auto") == Comparison(Pair("q", "a"), Pair("q", "b"))


def test_the_prompt_is_the_longest_common_prefix() -> None:
    again = {"role": "user", "content": "and?"}
    turns = {"chosen": [USER, GOOD, again, GOOD], "rejected": [USER, GOOD, again, BAD]}
    parsed = parse_row(turns, CONVERSATIONS, {}, "Auto")
    assert parsed == Comparison(Chat((USER, GOOD, again), GOOD), Chat((USER, GOOD, again), BAD))


@pytest.mark.parametrize(
    ("values", "kind", "reason", "part"),
    [
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "x"}, BAD]}, CONVERSATIONS, "NoCommonPrompt", "1"),
        ({"chosen": [GOOD], "rejected": [BAD]}, CONVERSATIONS, "NoCommonPrompt", "one prompt"),
        ({"chosen": "a", "rejected": "b"}, CONVERSATIONS, "NoCommonPrompt", "give the prompt"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, COMPARISON, "NoCommonPrompt", "prompt is empty"),
        (
            {
                "chosen": [SYSTEM, USER, GOOD],
                "rejected": [SYSTEM, {**USER, "content": "x"}, BAD],
            },
            CONVERSATIONS,
            "NoCommonPrompt",
            "part at message 2, which is no answer",
        ),
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]}, CONVERSATIONS, "NotOneAnswer", "chosen has 3"),
        ({"prompt": "q", "chosen": [GOOD], "rejected": "b"}, COMPARISON, "WrongType", "both be strings or both lists"),
        (
            {"prompt": "q", "chosen": [SYSTEM, GOOD], "rejected": [SYSTEM, BAD]},
            COMPARISON,
            "NoCommonPrompt",
            "begins with the role 'system' and has no user message",
        ),
        ({"prompt": "q", "chosen": "a"}, COMPARISON, "MissingColumn", "no rejected"),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, COMPARISON, "EmptyCompletion", "chosen is empty"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, COMPARISON, "NoAssistantTurn", "'user'"),
    ],
)
def test_bad_pairs_say_why(values: dict[str, Any], kind: Kind, reason: str, part: str) -> None:
    with pytest.raises(RowRefused) as caught:
        parse_row(values, kind, {}, "Auto")
    assert caught.value.reason == reason
    assert part in caught.value.detail


@pytest.mark.parametrize("value", ["0.5", True, [1], float("nan"), float("inf"), 10**400])
def test_a_margin_that_is_no_number(value: Any) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "gap": value}
    with pytest.raises(RowRefused, match=r"margin .the data's 'gap'. must be a finite number, it is") as caught:
        parse_row(row, COMPARISON, {"margin": "gap"}, "Auto")
    assert caught.value.reason == "MarginNotANumber"


ROOM = Limits(512, "Skip")


def encode(words: Vocabulary, row: Comparison, limits: Limits = ROOM) -> Encoded | RowRefused:
    return Tokeniser(words, limits, "Auto").encode([row])[0]


def one(outcome: Encoded | RowRefused) -> TrainingRow:
    assert isinstance(outcome, Encoded), outcome
    (row,) = outcome.rows
    return row


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="<|"), min_size=1, max_size=20)


@settings(max_examples=100)
@given(PLAIN, PLAIN, PLAIN, st.booleans())
def test_both_answers_stand_after_the_same_tokens(
    words: Vocabulary, prompt: str, good: str, bad: str, chat: bool
) -> None:
    if good == bad:
        return
    row = Comparison(Pair(prompt, good), Pair(prompt, bad))
    if chat:
        turns = ({"role": "user", "content": prompt},)
        row = Comparison(*(Chat(turns, {"role": "assistant", "content": text}) for text in (good, bad)))
    chosen, rejected = one(encode(words, row)).examples
    start = int(chosen.mask.argmax())
    assert start == int(rejected.mask.argmax()) > 0
    assert chosen.tokens[:start].tolist() == rejected.tokens[:start].tolist()
    for example, text in ((chosen, good), (rejected, bad)):
        assert example.mask.tolist() == [0] * start + [1] * (len(example.tokens) - start)
        assert words.decode(example.tokens[start:-1]) == text
        assert int(example.tokens[-1]) == words.stop


def test_equal_answers_are_refused_apart(words: Vocabulary) -> None:
    equal = encode(words, Comparison(Pair("q", "a b"), Pair("q", "a b")))
    assert isinstance(equal, RowRefused)
    assert equal.reason == IDENTICAL
    cut = encode(words, Comparison(Pair("q", "one two x"), Pair("q", "one two y")), Limits(4, "Truncate"))
    assert isinstance(cut, RowRefused)
    assert "once cut to the limit" in cut.detail


def test_a_prompt_too_long_is_too_long(words: Vocabulary) -> None:
    row = Comparison(Pair("one two three four", "a"), Pair("one two three four", "b"))
    count = len(words.ids(["one two three four"], specials=True)[0])
    assert isinstance(encode(words, row, Limits(512, "Skip", count)), Encoded)
    for policy in ("Skip", "Truncate"):
        refused = encode(words, row, Limits(512, policy, count - 1))
        assert isinstance(refused, RowRefused)
        assert refused.reason == TOO_LONG
        assert f"the prompt has {count} tokens, the limit is {count - 1} (data.maxPromptLength)" in refused.detail


def test_one_side_too_long_leaves_out_the_pair(words: Vocabulary) -> None:
    row = Comparison(Pair("q", "a"), Pair("q", "one two three four five six"))
    refused = encode(words, row, Limits(6, "Skip"))
    assert isinstance(refused, RowRefused)
    assert refused.reason == TOO_LONG
    cut = encode(words, row, Limits(6, "Truncate"))
    assert isinstance(cut, Encoded)
    assert cut.cut
    assert [len(example.tokens) for example in one(cut).examples] == [3, 6]


def test_one_bad_half_refuses_the_pair_and_no_other(words: Vocabulary) -> None:
    fine = Comparison(Pair("q", "a"), Pair("q", "b"))
    bad = Comparison(Pair("q", "a"), Pair("q", "b<|endoftext|>c"))
    outcomes = Tokeniser(words, Limits(512, "Skip"), "Auto").encode([fine, bad, fine])
    assert [isinstance(outcome, Encoded) for outcome in outcomes] == [True, False, True]
    assert isinstance(outcomes[1], RowRefused)
    assert outcomes[1].reason == "StopTokenInside"


def test_prepare_writes_pairs_with_margins(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = RewardModelConfig(margin_column="gap")
    with caplog.at_level(logging.INFO, "posttrain.prepare"):
        prepared = prepare(pair_job(tmp_path, model, rows(9), stage="RewardModel", reward_model=reward))
    tokens = TokenSet(Path(prepared.train_dir))
    assert (len(tokens), tokens.arity) == (9, 2)
    assert [row.values["margin"] for row in tokens] == [i / 4 for i in range(9)]
    assert prepared.resolved.total_steps == 3
    assert prepared.data_report.tokens == tokens.lengths().sum()
    for answer in ("chosen", "rejected"):
        assert f"train.jsonl line 3 {answer}: " in caplog.text


def test_margins_are_learnt_by_reward_models_alone(tmp_path: Path, model: Path) -> None:
    config = pair_job(tmp_path, model, rows(9), columns={"margin": "gap"})
    assert "margin" not in TokenSet(Path(prepare(config).train_dir))[0].values
    config = pair_job(tmp_path / "b", model, rows(9), columns={"margin": "gap"}, stage="RewardModel")
    assert TokenSet(Path(prepare(config).train_dir))[2].values == {"margin": 0.5}


def test_a_source_without_margins_has_margin_0(tmp_path: Path, model: Path) -> None:
    with_margin = source(write_jsonl(tmp_path / "a.jsonl", rows(3)), columns={"margin": "gap"})
    without = source(write_jsonl(tmp_path / "b.jsonl", rows(2)))
    config = job(tmp_path, [with_margin, without], stage="RewardModel", model=model_source(model))
    margins = [row.values["margin"] for row in TokenSet(Path(prepare(config).train_dir))]
    assert margins == [0, 0.25, 0.5, 0, 0]


def test_missing_margin_column(tmp_path: Path, model: Path) -> None:
    reward = RewardModelConfig(margin_column="strength")
    failure = failure_of(pair_job(tmp_path, model, rows(3), stage="RewardModel", reward_model=reward))
    assert failure.reason is Reason.DATASET_SCHEMA_INVALID
    assert "rewardModel.marginColumn" in failure.message
    assert "'strength', but the columns are: chosen, gap, prompt, rejected" in failure.message


def test_margin_not_a_number_has_its_row(tmp_path: Path, model: Path) -> None:
    bad = [*rows(5), {**rows(1)[0], "gap": "much"}]
    reward = RewardModelConfig(margin_column="gap")
    failure = failure_of(pair_job(tmp_path, model, bad, stage="RewardModel", reward_model=reward))
    assert failure.reason is Reason.DATA_ROWS_REJECTED
    assert "train.jsonl line 6: margin (the data's 'gap') must be a finite number, it is str 'much'" in failure.message


def test_no_common_prompt_has_its_row(tmp_path: Path, model: Path) -> None:
    good = [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}] * 3
    bad = {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "x"}, BAD]}
    failure = failure_of(pair_job(tmp_path, model, [*good, bad]))
    assert failure.reason is Reason.DATA_ROWS_REJECTED
    assert "train.jsonl line 4: chosen and rejected part at message 1" in failure.message
    assert "NoCommonPrompt 1" in failure.message


def test_equal_answers_are_counted_and_fail_no_job(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    equal = {"prompt": "q", "chosen": "same", "rejected": "same"}
    with caplog.at_level(logging.INFO, "posttrain.prepare"):
        prepared = prepare(pair_job(tmp_path, model, [*rows(3), equal]))
    assert prepared.data_report.refused_by_reason == {IDENTICAL: 1}
    assert (prepared.data_report.rows, prepared.data_report.used) == (4, 3)
    assert "IdenticalPair 1 (25.00%)" in caplog.text
    assert len(TokenSet(Path(prepared.train_dir))) == 3
    refused = json.loads((Path(prepared.train_dir).parent / "refused-train.jsonl").read_text())
    assert refused["place"] == "train.jsonl line 4"


def test_only_equal_answers(tmp_path: Path, model: Path) -> None:
    failure = failure_of(pair_job(tmp_path, model, [{"prompt": "q", "chosen": "same", "rejected": "same"}] * 2))
    assert failure.reason is Reason.NOTHING_TO_LEARN
    assert "answers of all 2 train rows are equal" in failure.message
    assert "train.jsonl line 1" in failure.message
