"""Makes small jobs for the tests of prepare: configurations, rows, tokenizers and model folders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers

from posttrain_api import names
from posttrain_api.trainer import (
    CheckpointConfig,
    DataConfig,
    DataSource,
    JobIdentity,
    ModelConfig,
    Scratch,
    Source,
    Topology,
    TrainerConfig,
    TrainingConfig,
)
from posttrain_trainer import tokenizer

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "plus",
    "minus",
    "makes",
    "is",
    "what",
    "the",
    "sum",
    "of",
    "and",
]
SCRATCH = Scratch(
    family="Llama",
    vocab_size=320,
    hidden_size=16,
    intermediate_size=32,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    max_length=128,
)
DATA: dict[str, Any] = {
    "max_length": 64,
    "loss_on": "Auto",
    "too_long": "Skip",
    "too_long_max_fraction": 0.1,
    "bad_rows_policy": "Fail",
    "bad_rows_max_fraction": 0.001,
}
TRAINING: dict[str, Any] = {
    "epochs": 1.0,
    "max_steps": None,
    "batch_size": 4,
    "tokens_per_micro_batch": 256,
    "learning_rate": 1e-3,
    "schedule": "Cosine",
    "warmup_steps": "Auto",
    "min_learning_rate_ratio": 0.0,
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "seed": 0,
}


def texts(count: int) -> list[dict[str, str]]:
    """Rows of a few words each, all different."""
    return [{"text": f"{WORDS[i % 20]} {i} plus {WORDS[(i * 7) % 20]} makes {i * 3}"} for i in range(count)]


def pairs(count: int) -> list[dict[str, str]]:
    """Prompt and completion."""
    return [{"prompt": f"what is {i} plus {i}? ", "completion": f"{2 * i} makes {WORDS[i % 20]}"} for i in range(count)]


def chats(count: int) -> list[dict[str, Any]]:
    """One question and its answer each."""
    return [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in pairs(count)
    ]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """One object per line; a string is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def source(path: Path, **fields: Any) -> DataSource:
    """A data source at this path."""
    return DataSource(uri=f"pvc://data/{path.name}", path=str(path), **fields)


def model_source(path: Path) -> ModelConfig:
    """A model folder."""
    return ModelConfig(source=Source(uri=f"pvc://models/{path.name}", path=str(path)))


def job(tmp_path: Path, train: Path | Sequence[DataSource], **fields: Any) -> TrainerConfig:
    """A one-process CPU job in `tmp_path`; `data`, `training` and everything else by name."""
    sources = (source(train),) if isinstance(train, Path) else tuple(train)
    data = DataConfig(train=sources, **{**DATA, **fields.pop("data", {})})
    training = TrainingConfig(**{**TRAINING, **fields.pop("training", {})})
    settings: dict[str, Any] = {
        "job": JobIdentity(namespace="test", name="job", uid="uid"),
        "stage": "Pretrain",
        "tuning": "Full",
        "model": ModelConfig(scratch=SCRATCH),
        "checkpoint": CheckpointConfig(every_steps=None, every_seconds=1800, keep_last=2, resume="Auto"),
        "topology": Topology(nodes=1, processes_per_node=1, gpus_per_node=0),
        "run_dir": str(tmp_path / "run"),
        "run_uri": "pvc://runs/job/uid",
        "work_dir": str(tmp_path / "work"),
        "grace_seconds": 20,
    }
    return TrainerConfig(data=data, training=training, **{**settings, **fields})


def sft(tmp_path: Path, model: Path, rows: list[Any], **fields: Any) -> TrainerConfig:
    """An SFT job on these rows and this model."""
    train = write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    return job(tmp_path, train, **{"stage": "SFT", "model": model_source(model), **fields})


def write_config(config: TrainerConfig, folder: Path) -> Path:
    """The config as the operator would mount it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / names.CONFIG_FILE
    path.write_text(config.to_json())
    return path


def small_tokenizer(vocab_size: int = 320) -> Any:
    """Trained from the words above."""
    return tokenizer.train([" ".join(WORDS), *(row["text"] for row in texts(50))], vocab_size, 128)


def model_folder(folder: Path, chosen: Any | None = None, positions: int = 128) -> Path:
    """A tiny Llama with weights and tokenizer, saved as transformers saves it."""
    chosen = chosen or small_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(chosen),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        eos_token_id=chosen.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    chosen.save_pretrained(folder)
    return folder


def run_module(module: str, env: dict[str, str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`python -m module` to its end."""
    command = [sys.executable, "-m", module]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
