"""What the loop costs beside the computation itself: tokens per second of the trainer over those of a bare torch loop.

`python -m benchmarks.trainer_overhead [--threads N]` makes the quickstart's model (0.87 million parameters) and rows
of up to 64 tokens, and trains both ways on the same micro-batches: once through worker, engine and loop, once by
forward, cross-entropy, backward, clip and AdamW alone. Rounds alternate, the medians are compared. Seconds are the
process's CPU seconds, so that other work on the machine does not decide; with one thread they are what a wall
clock shows on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from posttrain_api.records import DataReport, Resolved
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import runtime as runtime_module
from posttrain_trainer.assemble import assemble, course_of
from posttrain_trainer.job import Job, Outside
from posttrain_trainer.loop import Loop, Parts
from posttrain_trainer.metrics import MetricsFile
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.prepared import Prepared
from posttrain_trainer.state import State
from posttrain_trainer.tokenset import Example, TokenSetWriter

ROUND_STEPS, ROUNDS, WARM_UP, BATCH, BUDGET = 12, 5, 5, 64, 4096
VOCABULARY = 261


def configuration(run_dir: Path) -> TrainerConfig:
    """One rank on the CPU, no evaluation, one checkpoint at the end."""
    training = {
        "maxSteps": WARM_UP + ROUND_STEPS,
        "batchSize": BATCH,
        "tokensPerMicroBatch": BUDGET,
        "learningRate": 1e-3,
        "schedule": "Constant",
        "warmupSteps": 0,
        "minLearningRateRatio": 0.0,
        "weightDecay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-8,
        "maxGradNorm": 1.0,
        "seed": 0,
    }
    shape = {"vocabSize": VOCABULARY, "hiddenSize": 128, "intermediateSize": 352, "layers": 4, "heads": 4}
    data = {"tooLong": "Split", "tooLongMaxFraction": 1, "badRowsPolicy": "Fail", "badRowsMaxFraction": 0}
    return TrainerConfig.model_validate(
        {
            "job": {"namespace": "benchmark", "name": "overhead", "uid": "u"},
            "stage": "Pretrain",
            "tuning": "Full",
            "model": {"scratch": {"family": "Llama", **shape, "kvHeads": 4, "headDim": 32, "maxLength": 128}},
            "data": {"train": [{"uri": "pvc://data/none"}], "maxLength": 64, "lossOn": "All", **data},
            "training": training,
            "checkpoint": {"everySeconds": 3600, "keepLast": 1, "resume": "Never"},
            "topology": {"nodes": 1, "processesPerNode": 1, "gpusPerNode": 0},
            "runDir": str(run_dir),
            "runUri": "pvc://runs/overhead/u",
            "workDir": str(run_dir / "work"),
            "graceSeconds": 60,
        }
    )


def prepare(config: TrainerConfig) -> Prepared:
    """Random rows of 24 to 64 tokens and the model's shape."""
    run_dir = Path(config.run_dir)
    generator = np.random.default_rng(0)
    with TokenSetWriter(run_dir / "train") as writer:
        for length in generator.integers(24, 65, 2000):
            mask = np.ones(length, dtype=np.uint8)
            mask[0] = 0
            writer.append(Example(generator.integers(3, VOCABULARY, length).astype(np.int32), mask))
    llama_config().save_pretrained(run_dir / "model")
    return Prepared(
        config_digest=config.digest(),
        model_dir=str(run_dir / "model"),
        model_digest="sha256:none",
        tokenizer_dir=str(run_dir / "model"),
        train_dir=str(run_dir / "train"),
        data_digest="sha256:none",
        data_report=DataReport(rows=2000, used=2000, tokens=0),
        resolved=Resolved(
            zero_stage=0, warmup_steps=0, total_steps=WARM_UP + ROUND_STEPS, precision="FP32", attention="SDPA"
        ),
    )


def llama_config() -> Any:
    """The quickstart's shape."""
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        architectures=["LlamaForCausalLM"],
    )


class Clock:
    """Seconds and tokens of the steps after warm-up, as the loop reports them."""

    def __init__(self) -> None:
        self.tokens_per_second: list[float] = []
        self._last = (0.0, 0.0)

    def observe(self, metrics: dict[str, float], step: int) -> None:
        """From the end of one step to the end of the next: everything the loop does is in it."""
        now = (time.process_time(), metrics["num_tokens"])
        if step > WARM_UP:
            self.tokens_per_second.append((now[1] - self._last[1]) / (now[0] - self._last[0]))
        self._last = now


def through_the_loop(job: Job, parts: Parts, clock: Clock, resolved: Resolved) -> float:
    """Median tokens per second of one round."""
    clock.tokens_per_second.clear()
    assert Loop(parts, course_of(job.config, resolved), job.runtime, State()).run()
    return statistics.median(clock.tokens_per_second[:-1])  # the last has the checkpoint behind it


def bare(model: Any, optimizer: torch.optim.Optimizer, steps: list[list[MicroBatch]]) -> float:
    """Median tokens per second of forward, loss, backward, clip and step on ready-made tensors."""
    rates = []
    for number, micros in enumerate(steps):
        start = time.process_time()
        weight = sum(len(micro.targets) for micro in micros)
        optimizer.zero_grad()
        for micro in micros:
            logits = model(input_ids=micro.input_ids, use_cache=False).logits.flatten(0, 1)[micro.index]
            (torch.nn.functional.cross_entropy(logits, micro.targets, reduction="sum") / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if number >= WARM_UP:
            rates.append(sum(micro.tokens for micro in micros) / (time.process_time() - start))
    return statistics.median(rates)


def main() -> None:
    """Prints both medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    os.environ.update(one_rank)
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder))
        job = Job(config, prepare(config), runtime_module.start(config.topology, 0))
        torch.set_num_threads(threads)
        clock = Clock()
        parts, resolved = assemble(job, Outside(observers=[clock]))
        parts.recorder.open(MetricsFile(Path(folder) / "metrics.jsonl", 0))
        steps = [parts.feed.micros(step) for step in range(WARM_UP + ROUND_STEPS)]
        model = transformers.AutoModelForCausalLM.from_config(llama_config(), dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ours, plain = [], []
        for _ in range(ROUNDS):
            ours.append(through_the_loop(job, parts, clock, resolved))
            plain.append(bare(model, optimizer, steps))
    ratios = [first / second for first, second in zip(ours, plain, strict=True)]
    print(f"trainer {statistics.median(ours):,.0f} tokens per CPU second, bare torch {statistics.median(plain):,.0f}")
    print(f"ratio {statistics.median(ratios):.3f} (rounds {', '.join(f'{ratio:.3f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
