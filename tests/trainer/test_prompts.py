"""Prompts for rollouts: from rows to a prompt set with the columns of its rewards, and what is refused."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_kit import job, model_folder, small_tokenizer, source, write_jsonl

from posttrain_api.online import ColumnReward, LengthReward, RewardConfig, RolloutConfig
from posttrain_api.reasons import Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import preflight
from posttrain_trainer.data.build import Built, OpenSource, build, schema_of
from posttrain_trainer.data.columns import columns_of
from posttrain_trainer.data.fit import TOO_LONG, Encoded, Limits, fit_prompt
from posttrain_trainer.data.messages import RowRefused
from posttrain_trainer.data.readers import list_files
from posttrain_trainer.data.rows import Prompt, parse_row
from posttrain_trainer.data.schema import Kind, allowed_kinds, choose_kind
from posttrain_trainer.data.tokenise import Tokeniser
from posttrain_trainer.data.vocabulary import Vocabulary
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.lengths import settle
from posttrain_trainer.prompts import PromptSet
from posttrain_trainer.stops import generation_config_of, stops
from posttrain_trainer.tokenset import SHAPE, TokenSet, TokenSetWriter, set_files

MATH = RewardConfig(name="right", math=ColumnReward(column="answer"))
SHORT = RewardConfig(name="short", length=LengthReward(max_tokens=8))
ROLLOUT = RolloutConfig(batch_size=4, max_new_tokens=16)
USER, ANSWER = {"role": "user", "content": "what is 1 plus 1"}, {"role": "assistant", "content": "2"}


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    made = Vocabulary(small_tokenizer(), "test")
    made.require_chat()
    return made


def questions(count: int) -> list[dict[str, Any]]:
    """Sums and their results."""
    return [{"prompt": f"what is {i} plus {i}? ", "answer": str(2 * i), "level": i % 3} for i in range(count)]


def rl_job(tmp_path: Path, rows: list[Any] | Path, **fields: Any) -> TrainerConfig:
    """A GRPO job on these rows, or on this file; `columns` of its one source."""
    train = rows if isinstance(rows, Path) else write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    sources = [source(train, columns=fields.pop("columns", {}))]
    given = {"stage": "RL", "algorithm": "GRPO", "rewards": (MATH,), "rollout": ROLLOUT, **fields}
    return job(tmp_path, sources, **given)


def made(tmp_path: Path, config: TrainerConfig, words: Vocabulary) -> Built:
    """The prompt set in `tmp_path`/set, by the same steps as `prepare` makes it."""
    sources = []
    for one in config.data.train:
        opened = OpenSource(one, tuple(list_files(Path(one.path or ""), one.uri)))
        sources.append((opened, schema_of(opened, config)))
    data, limits = settle(config, 128)
    return build(tmp_path / "set", "train", sources, data, Tokeniser(words, limits, "Completion"))


def failure_of(tmp_path: Path, config: TrainerConfig, words: Vocabulary) -> TrainerFailure:
    with pytest.raises(TrainerFailure) as caught:
        made(tmp_path, config, words)
    return caught.value


def test_rows_become_prompts_with_their_columns(tmp_path: Path, words: Vocabulary) -> None:
    built = made(tmp_path, rl_job(tmp_path, questions(20)), words)
    prompts = PromptSet(tmp_path / "set")
    assert (len(prompts), prompts.sources) == (20, (20,))
    for number, row in enumerate(questions(20)):
        tokens = prompts.prompt(number)
        assert tokens.dtype == np.int32
        assert words.decode(tokens.tolist()) == row["prompt"]
        assert prompts.columns(number) == {"answer": row["answer"], "level": row["level"]}
    assert TokenSet(tmp_path / "set")[19].record == '{"answer": "38", "level": 1}'
    assert (built.report.rows, built.report.used, built.report.counted_tokens) == (20, 20, 0)
    assert built.report.tokens == TokenSet(tmp_path / "set").lengths().sum()


def test_messages_end_where_the_answer_begins(words: Vocabulary) -> None:
    parsed = parse_row({"prompt": [USER, ANSWER]}, Kind.PROMPT, {}, "Auto")
    assert parsed == Prompt((USER,))
    (encoded,) = Tokeniser(words, Limits(64, "Skip"), "Completion").encode([parsed])
    assert isinstance(encoded, Encoded)
    (example,) = encoded.rows[0].examples
    assert words.decode(example.tokens.tolist()) == words.render([USER], generation=True)
    assert not example.mask.any()


def test_sft_data_are_used_by_mapping_their_messages(
    tmp_path: Path, words: Vocabulary, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"messages": [USER, ANSWER], "prompt": "not this", "answer": 2},
        {"messages": [USER], "prompt": [USER, ANSWER], "answer": 3},
    ]
    with caplog.at_level(logging.INFO):
        made(tmp_path, rl_job(tmp_path, rows, columns={"prompt": "messages"}), words)
    assert "train.jsonl: 1 of the first 2 prompts end with an answer: it is left out" in caplog.text
    prompts = PromptSet(tmp_path / "set")
    assert words.decode(prompts.prompt(0).tolist()) == words.render([USER], generation=True)
    assert prompts.columns(0) == {"prompt": "not this", "answer": 2}


def test_kinds() -> None:
    kinds = allowed_kinds("RL", "Auto")
    assert kinds == (Kind.PROMPT,)
    assert choose_kind("u", {"prompt", "completion", "messages"}, {}, kinds) is Kind.PROMPT
    for theirs in ("question", "messages", "instruction"):
        with pytest.raises(TrainerFailure, match=rf"columns: \{{prompt: {theirs}\}}"):
            choose_kind("u", {theirs, "answer"}, {}, kinds)
    with pytest.raises(TrainerFailure, match=r"needs the columns \(prompt\), found: foo\. Set .*\{prompt: <column>\}"):
        choose_kind("u", {"foo"}, {}, kinds)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "EmptyPrompt"),
        (" \n", "EmptyPrompt"),
        ([{"role": "user", "content": " "}], "EmptyPrompt"),
        ([ANSWER], "EmptyPrompt"),
        ([], "WrongType"),
        (7, "WrongType"),
        ([{"from": "human", "value": "q"}], "WrongType"),
        (None, "MissingColumn"),
        ("\ud83d", "NotUnicode"),
    ],
)
def test_rows_without_a_prompt_are_refused(prompt: Any, reason: str) -> None:
    with pytest.raises(RowRefused) as caught:
        parse_row({"prompt": prompt, "answer": "1"}, Kind.PROMPT, {}, "Auto")
    assert caught.value.reason == reason


def test_an_empty_prompt_names_its_line(tmp_path: Path, words: Vocabulary) -> None:
    rows = [*questions(4), {"prompt": " ", "answer": "1"}]
    failure = failure_of(tmp_path, rl_job(tmp_path, rows), words)
    assert failure.reason is Reason.DATA_ROWS_REJECTED
    assert "train.jsonl line 5: prompt is empty" in failure.message
    assert "EmptyPrompt 1" in failure.message


@pytest.mark.parametrize("kind", ["math", "exact_match"])
def test_a_column_that_a_reward_names_must_be_there(tmp_path: Path, words: Vocabulary, kind: str) -> None:
    reward = RewardConfig.model_validate({"name": "right", kind: {"column": "solution"}})
    failure = failure_of(tmp_path, rl_job(tmp_path, questions(4), rewards=(SHORT, reward)), words)
    assert failure.reason is Reason.DATASET_SCHEMA_INVALID
    field = "math" if kind == "math" else "exactMatch"
    assert f"{field}.column of reward 'right' is 'solution'" in failure.message
    assert "are: answer, level" in failure.message


def test_the_prompt_is_no_column_for_a_reward(tmp_path: Path, words: Vocabulary) -> None:
    reward = RewardConfig(name="same", exact_match=ColumnReward(column="prompt"))
    assert failure_of(tmp_path, rl_job(tmp_path, questions(4), rewards=(reward,)), words).reason is (
        Reason.DATASET_SCHEMA_INVALID
    )


@pytest.mark.parametrize(
    "missing", [{"prompt": "q"}, {"prompt": "q", "answer": None}, '{"prompt": "q", "answer": NaN}'], ids=str
)
def test_a_row_without_the_column_is_a_bad_row(tmp_path: Path, words: Vocabulary, missing: Any) -> None:
    failure = failure_of(tmp_path, rl_job(tmp_path, [*questions(4), missing]), words)
    assert failure.reason is Reason.DATA_ROWS_REJECTED
    assert "line 5: no answer, which math.column of reward 'right' names" in failure.message
    skip = {"bad_rows_policy": "Skip", "bad_rows_max_fraction": 0.5}
    built = made(tmp_path, rl_job(tmp_path, [*questions(4), missing], data=skip), words)
    assert (built.report.used, built.report.refused_by_reason) == (4, {"MissingColumn": 1})


def test_what_tables_hold_and_json_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = pa.table(
        {
            "prompt": ["q"],
            "answer": [decimal.Decimal("72.50")],
            "day": [dt.date(2026, 1, 31)],
            "at": [dt.datetime(2026, 1, 31, 12, tzinfo=dt.UTC)],
            "score": [float("nan")],
            "nested": [{"scores": [1.5, float("nan")]}],
            "image": [b"\x89PNG"],
            "far": [float("inf")],
            "gone": pa.nulls(1),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    (values,) = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    columns = columns_of("prompt", [MATH])
    with caplog.at_level(logging.WARNING):
        columns.check("u", [values])
    assert [each.getMessage().split("column ")[1].split(" has")[0] for each in caplog.records] == ["'far'", "'image'"]
    assert json.loads(columns.record(values), parse_constant=pytest.fail) == {
        "answer": "72.50",
        "day": "2026-01-31",
        "at": "2026-01-31T12:00:00+00:00",
        "score": None,
        "nested": {"scores": [1.5, None]},
        "image": None,
        "far": None,
        "gone": None,
    }


@pytest.mark.parametrize("value", [b"42", float("inf"), [b"42"], dt.timedelta(1)])
def test_a_reward_is_not_given_null_for_what_json_cannot_hold(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    columns_of("prompt", [MATH]).check("u", [{"prompt": "q", "answer": value}])
    assert not caplog.records
    with pytest.raises(RowRefused, match=r"answer, which math\.column of reward 'right' names, has") as caught:
        columns_of("prompt", [MATH]).record({"prompt": "q", "answer": value})
    assert caught.value.reason == "NotJSON"


def test_half_a_surrogate_pair_in_a_column_is_refused() -> None:
    with pytest.raises(RowRefused, match="half a surrogate pair"):
        columns_of("prompt", []).record({"prompt": "q", "note": "\ud83d"})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100)
@given(st.dictionaries(st.text().filter(lambda name: name != "prompt"), VALUES, max_size=4))
def test_what_json_holds_comes_back(values: dict[str, Any]) -> None:
    record = columns_of("prompt", []).record({"prompt": "q", **values})
    assert "\n" not in record
    assert json.loads(record) == values


LONG = "what is one plus two plus three plus four plus five plus six "


@pytest.mark.parametrize(("policy", "counted"), [("Skip", TOO_LONG), ("Split", TOO_LONG), ("Truncate", "Truncated")])
def test_longer_prompts(tmp_path: Path, words: Vocabulary, policy: str, counted: str) -> None:
    data = {"max_prompt_length": 12, "too_long": policy}
    rows = [*questions(19), {"prompt": LONG, "answer": "21"}]
    built = made(tmp_path, rl_job(tmp_path, rows, data=data), words)
    assert built.report.refused_by_reason == {counted: 1}
    prompts = PromptSet(tmp_path / "set")
    assert len(prompts) == built.report.used == (20 if policy == "Truncate" else 19)
    if policy == "Truncate":
        whole = words.ids([LONG], specials=True)[0]
        assert prompts.prompt(19).tolist() == whole[-12:]
        assert prompts.columns(19) == {"answer": "21"}


def test_too_long_prompts_name_the_field_to_change(tmp_path: Path, words: Vocabulary) -> None:
    rows = [{"prompt": LONG, "answer": "21"}] * 4
    failure = failure_of(tmp_path, rl_job(tmp_path, rows, data={"max_prompt_length": 12}), words)
    assert failure.reason is Reason.NOTHING_TO_LEARN
    assert "the limit is 12 (data.maxPromptLength)" in failure.message
    assert failure.message.endswith("Raise data.maxPromptLength.")
    fail = {"max_prompt_length": 12, "too_long": "Fail"}
    failure = failure_of(tmp_path, rl_job(tmp_path, [*questions(9), *rows], data=fail), words)
    assert failure.reason is Reason.DATA_ROWS_REJECTED
    assert "Raise data.maxPromptLength, shorten them" in failure.message
    failure = failure_of(tmp_path, rl_job(tmp_path, [*questions(9), *rows], data={"max_length": 28}), words)
    assert "are longer than 12 tokens" in failure.message
    assert "(data.maxLength 28 less rollout.maxNewTokens 16)" in failure.message
    assert failure.message.endswith("Raise data.maxLength or data.tooLongMaxFraction.")


def test_a_cut_prompt_keeps_its_bos(words: Vocabulary) -> None:
    tokenizer = small_tokenizer()
    tokenizer.bos_token = "<|system|>"
    vocabulary = Vocabulary(tokenizer, "test")
    turns = ({"role": "system", "content": LONG}, USER)
    (cut,) = Tokeniser(vocabulary, Limits(10, "Truncate"), "Completion").encode([Prompt(turns)])
    assert isinstance(cut, Encoded)
    assert cut.cut
    whole = vocabulary.ids([vocabulary.render(turns, generation=True)], specials=False)[0]
    assert whole[0] == vocabulary.bos
    assert cut.rows[0].examples[0].tokens.tolist() == [whole[0], *whole[-9:]]


def test_a_prompt_of_bos_alone_is_empty() -> None:
    for tokens in ([], [4]):
        with pytest.raises(RowRefused, match="makes nothing of prompt") as caught:
            fit_prompt(tokens, Limits(10, "Skip"), 4, "{}")
        assert caught.value.reason == "EmptyPrompt"
    assert fit_prompt([5], Limits(10, "Skip"), 4, "{}").rows[0].record == "{}"


@pytest.mark.parametrize(
    ("data", "positions", "limit", "source"),
    [
        ({}, 128, 48, "data.maxLength 64 less rollout.maxNewTokens 16"),
        ({"max_prompt_length": 20}, 128, 20, "data.maxPromptLength"),
        ({"max_prompt_length": 48}, 128, 48, "data.maxPromptLength"),
        ({"max_prompt_length": 49}, 128, 48, "data.maxLength 64 less rollout.maxNewTokens 16"),
        ({}, 40, 24, "the model's 40 positions less rollout.maxNewTokens 16"),
        ({}, None, 48, "data.maxLength 64 less rollout.maxNewTokens 16"),
    ],
)
def test_prompt_and_completion_fit_together(
    tmp_path: Path, data: dict[str, Any], positions: int | None, limit: int, source: str
) -> None:
    settled, limits = settle(rl_job(tmp_path, questions(1), data=data), positions)
    assert (settled.max_prompt_length, limits.max_length, limits.source) == (limit, limit, source)
    assert limits.max_length + ROLLOUT.max_new_tokens <= settled.max_length


def test_a_lowered_limit_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settle(rl_job(tmp_path, questions(1), data={"max_prompt_length": 60}), 128)
    assert "data.maxPromptLength is 60, but rollout.maxNewTokens 16 leaves 48 of data.maxLength 64" in caplog.text


@pytest.mark.parametrize(
    ("positions", "reason", "advice"),
    [
        (128, Reason.NOTHING_TO_LEARN, "Lower it or raise data.maxLength."),
        (32, Reason.MODEL_INCOMPATIBLE, "of the model's 32 positions: no token is left for a prompt. Lower it."),
    ],
)
def test_completions_that_leave_no_prompt_are_refused(
    tmp_path: Path, positions: int, reason: Reason, advice: str
) -> None:
    config = rl_job(tmp_path, questions(1), rollout=RolloutConfig(max_new_tokens=64))
    with pytest.raises(TrainerFailure) as caught:
        settle(config, positions)
    assert caught.value.reason is reason
    assert caught.value.message.startswith("rollout.maxNewTokens is 64, of ")
    assert caught.value.message.endswith(advice)


class Generation:
    """Of a generation config, what is asked."""

    def __init__(self, eos: Any) -> None:
        self.eos_token_id = eos


def test_stops(words: Vocabulary) -> None:
    tokenizer = small_tokenizer()
    eos, user = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")
    assert stops(tokenizer, Generation(None), chat=False) == (eos,)
    assert stops(tokenizer, Generation([7, eos]), chat=True) == (eos, 7)
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<|user|>'")
    assert stops(tokenizer, Generation(7), chat=True) == (user, eos, 7)
    tokenizer.eos_token = None
    assert stops(tokenizer, Generation(7), chat=False) == (7,)
    with pytest.raises(TrainerFailure, match="no token ends a completion") as caught:
        stops(tokenizer, Generation(None), chat=False)
    assert caught.value.reason is Reason.MODEL_INCOMPATIBLE


def test_the_generation_config_or_else_the_models(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "tiny")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert generation_config_of(folder, "u", False).eos_token_id == [5, 6]
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(TrainerFailure, match=r"generation_config\.json cannot be read"):
        generation_config_of(folder, "u", False)
    (folder / "generation_config.json").unlink()
    assert generation_config_of(folder, "u", False).eos_token_id == small_tokenizer().eos_token_id


def test_prompts_are_shown_as_the_model_sees_them(tmp_path: Path, words: Vocabulary) -> None:
    rows = [{"prompt": [USER], "answer": 2, "long": "x" * 5000}] * 4
    built = made(tmp_path, rl_job(tmp_path, rows), words)
    shown = preflight.report(built.samples, words, True, (words.stop, 7))
    stop = words.decode([words.stop])
    assert f"a completion ends with the first of {stop!r} (id {words.stop}), {words.decode([7])!r} (id 7)" in shown
    assert shown.count(f"  prompt: {words.render([USER], generation=True)!r}") == 3
    assert shown.count('  columns for the rewards: {"answer": 2, "long": "xxx') == 3
    assert "characters left out" in shown
    assert "train.jsonl line 1: " in shown
    assert "without its chat template" not in shown
    assert "without its chat template" in preflight.report(built.samples, words, False, (words.stop,))


def test_records_are_files_of_the_set(tmp_path: Path, words: Vocabulary) -> None:
    first = made(tmp_path / "a", rl_job(tmp_path / "a", questions(5)), words)
    other = [{**row, "level": 9} for row in questions(5)]
    second = made(tmp_path / "b", rl_job(tmp_path / "b", other), words)
    assert {"records.jsonl", "records.bin"} <= set(set_files(tmp_path / "a" / "set"))
    assert first.digest != second.digest
    (tmp_path / "a" / "set" / "records.bin").unlink()
    with pytest.raises(FileNotFoundError):
        PromptSet(tmp_path / "a" / "set")


def test_a_set_without_records_is_none_of_prompts(tmp_path: Path) -> None:
    with TokenSetWriter(tmp_path / "set"):
        pass
    assert "records" not in json.loads((tmp_path / "set" / SHAPE).read_text())
    with pytest.raises(ValueError, match="no records"):
        PromptSet(tmp_path / "set")


def test_either_every_row_has_a_record_or_none(tmp_path: Path, words: Vocabulary) -> None:
    (encoded,) = Tokeniser(words, Limits(64, "Skip"), "Completion").encode([Prompt("what is")])
    assert isinstance(encoded, Encoded)
    (row,) = encoded.rows
    for records, record in ((True, None), (False, "{}")):
        with TokenSetWriter(tmp_path / "set", records=records) as writer, pytest.raises(ValueError, match="a record"):
            writer.append(*row.examples, record=record)
