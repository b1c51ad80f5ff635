"""prepare on whole jobs: manifests, token sets, tokenizers, reports."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from prepare_kit import (
    chats,
    job,
    model_folder,
    model_source,
    pairs,
    sft,
    small_tokenizer,
    source,
    texts,
    write_jsonl,
)

from posttrain_trainer import prepare as prepare_module
from posttrain_trainer import tokenizer as tokenizers_
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.prepare import prepare
from posttrain_trainer.prepared import read_manifest
from posttrain_trainer.tokenset import TokenSet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


def test_pretrain_from_scratch(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "train.jsonl", texts(50))
    held_out = write_jsonl(tmp_path / "eval.jsonl", texts(8))
    config = job(tmp_path, rows)
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval": (source(held_out),)})})
    prepared = prepare(config)
    assert read_manifest(Path(config.run_dir) / "prepared") == prepared
    tokenizer = transformers.AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    loaded = transformers.AutoConfig.from_pretrained(prepared.model_dir)
    assert (loaded.vocab_size, loaded.hidden_size, loaded.head_dim) == (320, 16, 8)
    assert len(tokenizer) <= 320
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == loaded.eos_token_id
    tokens = TokenSet(Path(prepared.train_dir))
    assert tokenizer.decode(tokens[3].examples[0].tokens) == texts(50)[3]["text"] + tokenizer.eos_token
    assert prepared.eval_dir is not None
    assert len(TokenSet(Path(prepared.eval_dir))) == 8
    assert prepared.data_report.used == 50
    assert prepared.data_report.tokens == tokens.lengths().sum()
    assert (prepared.resolved.total_steps, prepared.resolved.warmup_steps, prepared.resolved.zero_stage) == (13, 1, 0)


def test_trained_tokenizer_answers_with_generation_markers(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    messages = chats(1)[0]["messages"]
    encoded = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    answer = [token for token, ours in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if ours]
    assert tokenizer.decode(answer) == messages[1]["content"] + tokenizer.eos_token


def test_trained_tokenizer_is_deterministic(tmp_path: Path) -> None:
    script = "import sys; from prepare_kit import small_tokenizer; small_tokenizer(400).save_pretrained(sys.argv[1])"
    contents = []
    for number in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": number, "PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / number)], env=env, check=True)
        contents.append((tmp_path / number / "tokenizer.json").read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("rows", [pairs(20), chats(20)], ids=["pairs", "messages"])
def test_sft_counts_the_answers(tmp_path: Path, model: Path, rows: list[Any]) -> None:
    prepared = prepare(sft(tmp_path, model, rows))
    tokenizer = transformers.AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    for trained, row in zip(TokenSet(Path(prepared.train_dir)), pairs(20), strict=True):
        (example,) = trained.examples
        counted = example.tokens[example.mask == 1]
        assert tokenizer.decode(counted) == row["completion"] + tokenizer.eos_token
    weights = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict().values()
    assert prepared.resolved.parameters == sum(weight.numel() for weight in weights)
    assert prepared.model_dir == str(model)


def test_columns_are_mapped_and_rows_limited(tmp_path: Path, model: Path) -> None:
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in pairs(20)]
    train = write_jsonl(tmp_path / "gsm.jsonl", rows)
    mapped = source(train, columns={"prompt": "question", "completion": "answer"}, max_rows=7)
    prepared = prepare(job(tmp_path, [mapped], stage="SFT", model=model_source(model)))
    assert prepared.data_report.rows == 7


def test_second_time_does_nothing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sft(tmp_path, model, pairs(9))
    first = prepare(config)
    monkeypatch.setattr(prepare_module, "_prepare", None)
    assert prepare(config) == first
    monkeypatch.undo()
    monkeypatch.setenv("POSTTRAIN_ATTEMPT", "2")
    changed = config.model_copy(update={"grace_seconds": 99})
    second = prepare(changed)
    assert second.config_digest != first.config_digest
    assert second.data_digest == first.data_digest
    assert not Path(first.train_dir).exists()


def test_an_attempt_that_was_overtaken_leaves_its_successors_data(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft(tmp_path, model, pairs(9))
    successor = Path(config.run_dir) / "prepared" / "attempt-3"
    successor.mkdir(parents=True)
    (Path(config.run_dir) / "attempt.json").write_text('{"attempt": 3}')
    monkeypatch.setenv("POSTTRAIN_ATTEMPT", "2")
    with pytest.raises(TrainerFailure, match="attempt 3 has taken over"):
        prepare(config)
    assert successor.exists()
    assert not (Path(config.run_dir) / "prepared" / "manifest.json").exists()


def test_digests_tell_data_and_models_apart(tmp_path: Path, model: Path) -> None:
    first = prepare(sft(tmp_path / "a", model, pairs(9)))
    other_data = prepare(sft(tmp_path / "b", model, pairs(10)))
    other_model = prepare(sft(tmp_path / "c", model_folder(tmp_path / "m"), pairs(9)))
    assert first.data_digest != other_data.data_digest
    assert first.model_digest == other_data.model_digest
    assert first.model_digest != other_model.model_digest


def test_first_rows_are_shown_with_their_mask(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "posttrain.prepare"):
        prepare(sft(tmp_path, model, pairs(9)))
    assert "train.jsonl line 3: " in caplog.text
    assert "+" in caplog.text
    assert "'<|endoftext|>'" in caplog.text


def test_pad_equal_to_eos_works(tmp_path: Path) -> None:
    chosen = small_tokenizer()
    chosen.pad_token = chosen.eos_token
    prepared = prepare(sft(tmp_path, model_folder(tmp_path / "m", chosen), pairs(9)))
    for (example,) in (trained.examples for trained in TokenSet(Path(prepared.train_dir))):
        assert (example.tokens[-1], example.mask[-1]) == (chosen.eos_token_id, 1)


def test_skip_leaves_out_and_reports(tmp_path: Path, model: Path) -> None:
    rows: list[Any] = [*pairs(18), "{broken", {"prompt": "only"}]
    limits = {"bad_rows_policy": "Skip", "bad_rows_max_fraction": 0.1}
    prepared = prepare(sft(tmp_path, model, rows, data=limits))
    assert prepared.data_report.refused_by_reason == {"BrokenJSON": 1, "MissingColumn": 1}
    assert (prepared.data_report.rows, prepared.data_report.used) == (20, 18)
    refused = (Path(prepared.train_dir).parent / "refused-train.jsonl").read_text().splitlines()
    assert [json.loads(line)["place"] for line in refused] == ["train.jsonl line 19", "train.jsonl line 20"]


def test_truncated_rows_are_reported(tmp_path: Path, model: Path) -> None:
    rows = [*pairs(19), {"prompt": "what ", "completion": "one " * 100}]
    prepared = prepare(sft(tmp_path, model, rows, data={"too_long": "Truncate"}))
    assert prepared.data_report.refused_by_reason == {"Truncated": 1}
    assert prepared.data_report.used == 20


GSM8K = (
    Path(os.environ.get("POSTTRAIN_TEST_DATA", Path(__file__).parents[2] / "../shared/data")) / "gsm8k" / "train.jsonl"
)


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"GSM8K is not at {GSM8K}; set POSTTRAIN_TEST_DATA")
def test_gsm8k(tmp_path: Path) -> None:
    problems = [json.loads(line) for line in GSM8K.read_text().splitlines()[:1000]]
    words = tokenizers_.train((problem["question"] + problem["answer"] for problem in problems), 2000, 1024)
    model = model_source(model_folder(tmp_path / "m", words, positions=1024))
    train = source(GSM8K, columns={"prompt": "question", "completion": "answer"}, max_rows=1000)
    prepared = prepare(job(tmp_path, [train], stage="SFT", model=model, data={"max_length": 1024}))
    assert (prepared.data_report.rows, prepared.data_report.used) == (1000, 1000)
    for trained, problem in zip(TokenSet(Path(prepared.train_dir)), problems, strict=True):
        (example,) = trained.examples
        assert words.decode(example.tokens[example.mask == 1]) == problem["answer"] + words.eos_token
        assert words.decode(example.tokens[example.mask == 0]) == problem["question"]
