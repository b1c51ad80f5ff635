"""What data cost: rows per second and host memory of `prepare` and of a rank's feed, at one and at ten times the rows.

`python -m benchmarks.data_scale [--rows N] [--kinds jsonl parquet pairs]` makes shards of rows of mixed length (of one
word to a few hundred), prepares them, and reads an epoch and an evaluation of the token set as one of two ranks does.
Each measurement is a process of its own. Memory is what the process holds at its peak beyond what it held when its
libraries were loaded and a first small job was through; seconds are the process's CPU seconds, all threads together,
and the clock's. Memory must be flat: what grows with ten times the rows is shown in the last column.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SHARDS, FACTOR, WORDS = 4, 10, 200
MIB = 2**20
KINDS = ("jsonl", "parquet", "pairs")


def rows(kind: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    """Made-up questions and answers; the lengths' logarithms are even, as in real sets."""
    draw = random.Random(seed)
    for number in range(count):
        prompt = f"{number}: " + _words(draw, 2 ** draw.uniform(0, 6))
        answers = [_words(draw, 2 ** draw.uniform(0, 8)) for _ in range(2)]
        if kind == "pairs":
            yield {"prompt": prompt, "chosen": answers[0], "rejected": answers[1] + "."}
        else:
            yield {"prompt": prompt, "completion": answers[0]}


def _words(draw: random.Random, count: float) -> str:
    return " ".join(draw.choices(VOCABULARY, k=int(count)))


VOCABULARY = ["".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=2 + n % 9)) for n in range(WORDS)]


def write_shards(folder: Path, kind: str, count: int) -> None:
    """`count` rows in SHARDS files."""
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        made = rows(kind, count // SHARDS, shard)
        if kind == "parquet":
            path = folder / f"part-{shard}.parquet"
            schema = pa.schema([("prompt", pa.string()), ("completion", pa.string())])
            with pq.ParquetWriter(path, schema) as writer:
                while group := [row for _, row in zip(range(5000), made, strict=False)]:
                    writer.write_table(pa.Table.from_pylist(group, schema=schema))
        else:
            with (folder / f"part-{shard}.jsonl").open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in made)


def model_folder(folder: Path) -> None:
    """A tiny model with a tokenizer trained on rows of this kind."""
    import transformers

    from posttrain_trainer import tokenizer

    texts = (value for row in rows("jsonl", 2000, 99) for value in row.values())
    chosen = tokenizer.train(texts, 1000, 4096)
    config = transformers.LlamaConfig(
        vocab_size=len(chosen), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    chosen.save_pretrained(folder)


def configuration(kind: str, data: Path, model: Path, run_dir: Path) -> Any:
    """A job on all shards of `data`."""
    from posttrain_api.trainer import TrainerConfig

    training = {"epochs": 1, "batchSize": 64, "tokensPerMicroBatch": 8192, "learningRate": 1e-3, "seed": 0}
    training |= {"schedule": "Constant", "warmupSteps": 0, "minLearningRateRatio": 0, "weightDecay": 0, "beta1": 0.9}
    training |= {"beta2": 0.95, "epsilon": 1e-8, "maxGradNorm": 1}
    limits = {"maxLength": 2048, "tooLong": "Skip", "tooLongMaxFraction": 1, "badRowsPolicy": "Fail"}
    return TrainerConfig.model_validate(
        {
            "job": {"namespace": "benchmark", "name": "data", "uid": "u"},
            "stage": "Preference" if kind == "pairs" else "SFT",
            "algorithm": "DPO" if kind == "pairs" else None,
            "tuning": "Full",
            "model": {"source": {"uri": "pvc://models/tiny", "path": str(model)}},
            "data": {
                "train": [{"uri": "pvc://data/shards", "path": str(data)}],
                "lossOn": "Auto",
                "badRowsMaxFraction": 0,
                **limits,
            },
            "training": training,
            "checkpoint": {"everySeconds": 3600, "keepLast": 1, "resume": "Never"},
            "topology": {"nodes": 1, "processesPerNode": 1, "gpusPerNode": 0},
            "runDir": str(run_dir),
            "runUri": "pvc://runs/data/u",
            "workDir": str(run_dir / "work"),
            "graceSeconds": 60,
        }
    )


def prepare_once(kind: str, data: Path, model: Path, run_dir: Path) -> int:
    """Rows prepared."""
    from posttrain_trainer.prepare import prepare

    return prepare(configuration(kind, data, model, run_dir)).data_report.rows


def feed_once(folder: Path, steps: int | None) -> int:
    """Rows fed: an epoch (or so many steps) and an evaluation of the same set, as rank 0 of 2."""
    from posttrain_trainer.batching import Feed, Share, whole_set
    from posttrain_trainer.sampler import Sampler
    from posttrain_trainer.tokenset import TokenSet

    tokens, part = TokenSet(folder), Share(0, 2, 8192)
    sampler = Sampler(len(tokens), 64, len(tokens), 0)
    feed, count = Feed(tokens, sampler, part), 0
    for step in range(sampler.steps if steps is None else min(steps, sampler.steps)):
        count += sum(len(micro.rows) for micro in feed.micros(step))
    if steps is None:
        count += sum(len(micro.rows) for micro in whole_set(tokens, part))
    return count


def measure(small: Callable[[], Any], work: Callable[[], int]) -> dict[str, float]:
    """Rows, seconds and memory of `work`, once `small` has loaded and filled what is filled once."""
    small()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    clock, cpu = time.perf_counter(), time.process_time()
    done = work()
    seconds = {"clock": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
    return {"rows": done, **seconds, "grown": _memory("VmHWM") - before, "peak": _memory("VmHWM")}


def _memory(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / MIB


def child(options: argparse.Namespace) -> None:
    """One measurement, as a JSON line."""
    root, kind = options.root, options.kind
    small = root / kind / "small"
    if options.child == "prepare":
        model, run_dir = root / "model", root / kind / f"run-{options.size}"
        found = measure(
            lambda: prepare_once(kind, small, model, Path(tempfile.mkdtemp(dir=root))),
            lambda: prepare_once(kind, root / kind / options.size, model, run_dir),
        )
    else:
        folder = root / kind / f"run-{options.size}" / "prepared" / "attempt-0" / "train"
        found = measure(lambda: feed_once(folder, 20), lambda: feed_once(folder, None))
    print(json.dumps(found))


def measured(root: Path, kind: str, what: str, size: str) -> dict[str, float]:
    """The same from a new process."""
    command = [sys.executable, "-m", "benchmarks.data_scale", "--child", what, "--kind", kind, "--size", size]
    done = subprocess.run([*command, "--root", str(root)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(kinds: list[str], count: int, root: Path) -> None:
    """All measurements, as a table."""
    model_folder(root / "model")
    print(f"{'':18} {'rows':>9} {'rows/s':>8} {'rows/CPU s':>10} {'peak MiB':>9} {'grown MiB':>9}")
    for kind in kinds:
        for size, times in (("small", 256), ("1x", count), ("10x", FACTOR * count)):
            write_shards(root / kind / size, kind, times)
        for what in ("prepare", "feed"):
            for size in ("1x", "10x"):
                found = measured(root, kind, what, size)
                print(
                    f"{kind + ' ' + what + ' ' + size:18} {found['rows']:9.0f} {found['rows'] / found['clock']:8.0f} "
                    f"{found['rows'] / found['cpu']:10.0f} {found['peak']:9.0f} {found['grown']:9.1f}",
                    flush=True,
                )


def main() -> None:
    """The table, or one measurement of it in a child."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="rows at 1x")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--child", choices=("prepare", "feed"), help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(options.kinds, options.rows, Path(folder))


if __name__ == "__main__":
    main()
