"""What the trainer's tests share: a prepared folder from token lists, and ranks forked from a process that has
imported everything.

Importing torch, transformers and DeepSpeed takes ten seconds; a rank forked from the fork server starts in a
fraction of one. The ranks are real processes with a real gloo group, and may be killed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_api.records import DataReport, Resolved
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.prepared import Prepared, write_manifest
from posttrain_trainer.tokenset import Example, TokenSetWriter

VOCABULARY = 61
PATIENCE = float(os.environ.get("POSTTRAIN_TEST_PATIENCE", "280"))
"""Seconds that ranks may take: less than pytest's own limit, whose report does not show what the ranks said."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "trainer_jobs",
        "deepspeed.runtime.zero.muon.original_muon",  # compiles a function at import, and so imports the compiler
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.modeling_auto",
    ]
)

Job = tuple[Any, ...]
Rows = Sequence[Any]
"""Of `rows`: (tokens, mask). Of `pairs`: (chosen, rejected) or (chosen, rejected, margin)."""


def rows(count: int, seed: int = 0, longest: int = 24) -> list[tuple[list[int], list[int]]]:
    """Rows of different lengths; the first part of each is not counted, the rest is, and some tokens in between are
    not."""
    random_ = random.Random(seed)
    made = []
    for _ in range(count):
        length = random_.randint(4, longest)
        tokens = [random_.randrange(3, VOCABULARY) for _ in range(length)]
        prompt = random_.randint(1, length - 2)
        mask = [0] * prompt + [1] + [int(random_.random() < 0.8) for _ in range(length - prompt - 1)]
        made.append((tokens, mask))
    return made


def pairs(count: int, seed: int = 0, longest: int = 24, margins: bool = False) -> list[tuple[Any, ...]]:
    """Rows of a chosen and a rejected answer to one prompt, all of different lengths; with a margin if asked for."""
    random_ = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = [random_.randrange(3, VOCABULARY) for _ in range(random_.randint(1, longest // 2))]
        answers = [
            [random_.randrange(3, VOCABULARY) for _ in range(random_.randint(1, longest - len(prompt)))]
            for _ in range(2)
        ]
        both = [(prompt + answer, [0] * len(prompt) + [1] * len(answer)) for answer in answers]
        made.append((*both, random_.random()) if margins else tuple(both))
    return made


def write_tokens(folder: Path, examples: Rows) -> None:
    paired = bool(examples) and isinstance(examples[0][0], tuple)
    columns = ["margin"] if paired and len(examples[0]) > 2 else []
    with TokenSetWriter(folder, 2 if paired else 1, columns) as writer:
        for row in examples:
            parts = row[:2] if paired else [row]
            given = [
                Example(np.asarray(tokens, dtype=np.int32), np.asarray(mask, dtype=np.uint8)) for tokens, mask in parts
            ]
            writer.append(*given, **dict(zip(columns, row[2:], strict=True) if paired else {}))


def make_config(run_dir: Path, **changes: Any) -> TrainerConfig:
    """A small CPU job. `changes`: dotted names with __ for the dot, for example training__batch_size=4."""
    wire: dict[str, Any] = {
        "job": {"namespace": "test", "name": "tiny", "uid": "u1"},
        "stage": "SFT",
        "tuning": "Full",
        "model": {"source": {"uri": "pvc://models/tiny", "path": str(run_dir / "model")}},
        "data": {
            "train": [{"uri": "pvc://data/train.jsonl", "path": str(run_dir / "train.jsonl")}],
            "max_length": 64,
            "loss_on": "Auto",
            "too_long": "Skip",
            "too_long_max_fraction": 0.1,
            "bad_rows_policy": "Fail",
            "bad_rows_max_fraction": 0.0,
        },
        "training": {
            "epochs": None,
            "max_steps": 6,
            "batch_size": 6,
            "tokens_per_micro_batch": 60,
            "learning_rate": 1e-2,
            "schedule": "Cosine",
            "warmup_steps": 1,
            "min_learning_rate_ratio": 0.1,
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.95,
            "epsilon": 1e-8,
            "max_grad_norm": 1.0,
            "seed": 7,
        },
        "checkpoint": {"every_steps": None, "every_seconds": 1800, "keep_last": 2, "resume": "Auto"},
        "topology": {"nodes": 1, "processes_per_node": 1, "gpus_per_node": 0},
        "run_dir": str(run_dir),
        "run_uri": "pvc://runs/tiny/u1",
        "work_dir": str(run_dir / "work"),
        "grace_seconds": 60,
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        place = wire
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return TrainerConfig.model_validate(wire)


@dataclass(frozen=True)
class Shape:
    """The tiny model. Two parameters are tied where `tied`."""

    hidden: int = 32
    layers: int = 2
    tied: bool = False
    attention_dropout: float = 0.0

    def config(self) -> Any:
        import transformers

        return transformers.LlamaConfig(
            vocab_size=VOCABULARY + 3,
            hidden_size=self.hidden,
            intermediate_size=2 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=self.tied,
            attention_dropout=self.attention_dropout,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )


def make_model(folder: Path, shape: Shape = Shape(), seed: int = 3) -> None:
    """Weights and tokenizer as a user's model folder has them."""
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.AutoModelForCausalLM.from_config(shape.config(), dtype=torch.float32).save_pretrained(folder)
    make_tokenizer(folder)


def make_reward_model(folder: Path, shape: Shape = Shape(), seed: int = 3) -> None:
    """As `make_model`, with a head for scores whose weights are in the folder."""
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = shape.config()
        config.num_labels = 1
        transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    import tokenizers
    import transformers

    words = {f"t{number}": number for number in range(VOCABULARY)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t3"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="t0", eos_token="t1", pad_token="t2", unk_token="t3"
    )
    tokenizer.save_pretrained(folder)


def prepare(config: TrainerConfig, train: Rows, evaluation: Rows = (), **changes: Any) -> Prepared:
    """Writes `<run_dir>/prepared` as the real preparation would; `changes` are fields of Resolved or Prepared."""
    run_dir = Path(config.run_dir)
    folder = run_dir / "prepared"
    write_tokens(folder / "train", train)
    if evaluation:
        write_tokens(folder / "eval", evaluation)
    make_tokenizer(folder / "tokenizer")
    training = config.training
    total = training.max_steps or -(-len(train) * (training.epochs or 1) // training.batch_size)
    resolved = {
        "zero_stage": 0 if config.zero_stage == "Auto" else config.zero_stage,
        "warmup_steps": 0 if training.warmup_steps == "Auto" else training.warmup_steps,
        "total_steps": int(total),
        "precision": "FP32",
        "attention": "SDPA",
    }
    resolved |= {name: changes.pop(name) for name in list(changes) if name in resolved}
    tokens = sum(len(part[0]) for row in train for part in (row[:2] if isinstance(row[0], tuple) else [row]))
    fields = {
        "config_digest": config.digest(),
        "model_dir": str(run_dir / "model"),
        "model_digest": _model_digest(config, Path(changes.get("model_dir", run_dir / "model"))),
        "tokenizer_dir": str(folder / "tokenizer"),
        "train_dir": str(folder / "train"),
        "eval_dir": str(folder / "eval") if evaluation else None,
        "data_digest": "sha256:data",
        "data_report": DataReport(rows=len(train), used=len(train), tokens=tokens),
        "resolved": Resolved(**resolved),
    }
    prepared = Prepared(**(fields | changes))
    write_manifest(folder, prepared)
    (run_dir / "config.json").write_text(config.to_json())
    return prepared


def _model_digest(config: TrainerConfig, folder: Path) -> str:
    from posttrain_trainer.model_files import CONFIG, digest_of, weight_files

    weights = [] if config.model.scratch else weight_files(folder, "pvc://models/tiny")
    return digest_of([folder / CONFIG, *weights])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Ranks:
    """Running ranks of one group."""

    processes: list[Any]
    logs: list[Path]

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Exit codes; the ranks' output is shown where one is late."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        late = [process for process in self.processes if process.is_alive()]
        for process in late:
            process.kill()
        assert not late, self.output()
        return [process.exitcode for process in self.processes]

    def output(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in self.logs if log.exists())


@functools.cache
def _start_server() -> None:
    """The fork server imports with this environment; pytest's own stays as it was."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu"}
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    multiprocessing.forkserver.ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def start_ranks(target: Callable[..., None], arguments: tuple[Any, ...], ranks: int, folder: Path, **env: str) -> Ranks:
    """Forks `ranks` processes that run target(*arguments) with torchrun's environment; output goes to
    `folder`/rank-<r>.log."""
    _start_server()
    folder.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    processes, logs = [], []
    for rank in range(ranks):
        given = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": "2",  # one thread each: the machine is shared
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            **env,
        }
        log = folder / f"rank-{rank}.log"
        process = CONTEXT.Process(target=_rank, args=(target, arguments, given, str(log)), daemon=True)
        process.start()
        processes.append(process)
        logs.append(log)
    return Ranks(processes, logs)


def run_ranks(target: Callable[..., None], arguments: tuple[Any, ...], ranks: int, folder: Path, **env: str) -> None:
    """Runs to the end and asserts success."""
    running = start_ranks(target, arguments, ranks, folder, **env)
    codes = running.wait()
    assert codes == [0] * ranks, running.output()


def start_worker(config: TrainerConfig, ranks: int = 1, attempt: int = 1, job: Job = ("work",)) -> Ranks:
    """Real workers of a prepared job. `job`: a function of trainer_jobs and its arguments."""
    run_dir = Path(config.run_dir)
    for old in (run_dir / "work" / "ends").glob("*.json"):
        old.unlink()
    given = {"POSTTRAIN_CONFIG": str(run_dir / "config.json"), "POSTTRAIN_ATTEMPT": str(attempt)}
    return start_ranks(call, job, ranks, run_dir / f"logs-{attempt}", **given)


def run_worker(config: TrainerConfig, ranks: int = 1, attempt: int = 1, job: Job = ("work",)) -> list[dict[str, Any]]:
    """The end records of all ranks, whatever they say."""
    running = start_worker(config, ranks, attempt, job)
    codes = running.wait()
    found = ends(config, ranks, running)
    assert codes == [end["exitCode"] for end in found], running.output()
    return found


def succeed(config: TrainerConfig, ranks: int = 1, attempt: int = 1, job: Job = ("work",)) -> dict[str, Any]:
    """Runs to success; the success record."""
    found = run_worker(config, ranks, attempt, job)
    assert all("reason" not in end for end in found), found
    return dict(found[0]["success"])


def steady_lines(config: TrainerConfig) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock and the memory say."""
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    unsteady = ("time/", "step_time", "tokens_per_second", "memory_bytes")
    steady = lambda name: not name.startswith(unsteady) and not name.endswith("/seconds")  # noqa: E731
    return [{name: value for name, value in line.items() if steady(name)} for line in lines]


def exported(config: TrainerConfig) -> dict[str, bytes]:
    """The weight files of the output."""
    return {path.name: path.read_bytes() for path in (Path(config.run_dir) / "output").glob("*.safetensors")}


def call(name: str, *arguments: Any) -> None:
    import trainer_jobs

    getattr(trainer_jobs, name)(*arguments)


def ends(config: TrainerConfig, ranks: int, running: Ranks) -> list[dict[str, Any]]:
    found = []
    for rank in range(ranks):
        path = Path(config.work_dir) / "ends" / f"rank-{rank}.json"
        assert path.exists(), running.output()
        found.append(json.loads(path.read_text()))
    return found


def _rank(target: Callable[..., None], arguments: tuple[Any, ...], env: dict[str, str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(env)
    try:
        target(*arguments)
    except BaseException:  # noqa: BLE001  a forked rank must never return into pytest
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    with contextlib.suppress(ValueError):  # the parent's buffers may be closed
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)
