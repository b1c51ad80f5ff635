"""Our side of a comparison: the parts that a job's worker assembles, and the one loop. Started by `trainer_vs_trl`."""

from __future__ import annotations

import os
import socket
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case, Round, Stopwatch, read_rows, row_tokens, serve
from posttrain_api.records import DataReport, Resolved
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import packing
from posttrain_trainer import runtime as runtime_module
from posttrain_trainer.assemble import assemble, course_of
from posttrain_trainer.batching import Feed
from posttrain_trainer.job import Job, Outside
from posttrain_trainer.loop import Loop, Parts
from posttrain_trainer.metrics import MetricsFile
from posttrain_trainer.prepared import Prepared
from posttrain_trainer.recorder import Observer
from posttrain_trainer.sampler import Sampler
from posttrain_trainer.state import State
from posttrain_trainer.tokenset import Example, TokenSet, TokenSetWriter


def configuration(case: Case) -> TrainerConfig:
    """One rank, full fine-tuning, AdamW at a constant rate, clipping at 1."""
    preference = {"algorithm": "DPO", "preference": {"beta": 0.1}} if case.stage == "Preference" else {}
    training = {
        "maxSteps": case.steps,
        "batchSize": case.batch,
        "tokensPerMicroBatch": 4096,
        "learningRate": 1e-5,
        "schedule": "Constant",
        "warmupSteps": 0,
        "minLearningRateRatio": 0.0,
        "weightDecay": 0.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "maxGradNorm": 1.0,
        "seed": 0,
        "precision": case.precision,
    }
    data = {"tooLong": "Skip", "tooLongMaxFraction": 0, "badRowsPolicy": "Fail", "badRowsMaxFraction": 0}
    return TrainerConfig.model_validate(
        {
            "job": {"namespace": "benchmark", "name": "beside", "uid": "u"},
            "stage": case.stage,
            "tuning": "Full",
            "model": {"source": {"uri": "pvc://models/m", "path": str(Path(case.folder) / "model")}},
            "data": {"train": [{"uri": "pvc://data/none"}], "maxLength": case.max_length, "lossOn": "Auto", **data},
            "training": training,
            "zeroStage": case.zero_stage,
            "checkpoint": {"everySeconds": 36000, "keepLast": 1, "resume": "Never"},
            "topology": {"nodes": 1, "processesPerNode": 1, "gpusPerNode": int(case.device == "cuda")},
            "runDir": str(Path(case.folder) / "ours"),
            "runUri": "pvc://runs/beside/u",
            "workDir": str(Path(case.folder) / "ours" / "work"),
            "graceSeconds": 60,
            **preference,
        }
    )


def prepared(case: Case, config: TrainerConfig) -> Prepared:
    """The rows as a token set: prompts are not counted."""
    rows, folder = read_rows(case), Path(config.run_dir) / "train"
    with TokenSetWriter(folder, arity=len(rows[0]["answers"])) as writer:
        for row in rows:
            writer.append(*(_example(row["prompt"], answer) for answer in row["answers"]))
    return prepared_as(case, config, folder)


def prepared_as(case: Case, config: TrainerConfig, folder: Path) -> Prepared:
    """The manifest of a token set in `folder`."""
    model = str(Path(case.folder) / "model")
    return Prepared(
        config_digest=config.digest(),
        model_dir=model,
        model_digest="sha256:none",
        tokenizer_dir=model,
        train_dir=str(folder),
        data_digest="sha256:none",
        data_report=DataReport(rows=case.rows, used=case.rows, tokens=0),
        resolved=Resolved(
            zero_stage=case.zero_stage,
            warmup_steps=0,
            total_steps=case.steps,
            precision=case.precision,
            attention="SDPA",
        ),
    )


def _example(prompt: list[int], answer: list[int]) -> Example:
    mask = np.array([0] * len(prompt) + [1] * len(answer), dtype=np.uint8)
    return Example(np.array(prompt + answer, dtype=np.int32), mask)


def assembled(config: TrainerConfig, here: Prepared, observer: Observer) -> tuple[Job, Parts, Resolved]:
    """A job of one rank with its parts, nothing trained yet."""
    os.environ.update(
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    )
    job = Job(config, here, runtime_module.start(config.topology, 0))
    parts, resolved = assemble(job, Outside(observers=[observer]))
    parts.recorder.open(MetricsFile(Path(config.run_dir) / "metrics.jsonl", 0))
    return job, parts, resolved


class Ours:
    """The assembled parts; a round starts the loop from step 0 with the weights of the round before."""

    def __init__(self, case: Case) -> None:
        packing.PACKED = case.packed
        self.config = config = configuration(case)
        here = prepared(case, config)
        self._rows = [row_tokens(row) for row in read_rows(case)]
        self._job, self.parts, self._resolved = assembled(config, here, self)
        self._tokens = TokenSet(Path(here.train_dir))
        self._watch, self.lines = Stopwatch(), list[dict[str, float]]()

    def observe(self, metrics: dict[str, float], step: int) -> None:
        """After each step."""
        self._watch.lap()
        self.lines.append(dict(metrics))

    def round(self, size: int, steps: int) -> Round:
        """The first `steps` batches, micro-batches of `size` tokens. The first loss is not checked: after a round the
        policy is no longer its reference."""
        batch = self.config.training.batch_size
        sampler = Sampler(len(self._tokens), batch, steps * batch, 0)
        feed = Feed(self._tokens, sampler, replace(_share(self.parts.feed), budget=size))
        resolved = self._resolved.model_copy(update={"total_steps": steps})
        course = course_of(self.config, resolved)
        self.lines.clear()
        self._watch.start()
        assert Loop(replace(self.parts, feed=feed, start=None), course, self._job.runtime, State()).run()
        rows = [int(row) for step in range(steps) for row in sampler.rows(step)]
        phases = {name: sum(line.get(f"time/{name}", 0.0) for line in self.lines) for name in _phases(self.lines)}
        loss, norm = (statistics.mean(line[name] for line in self.lines) for name in ("loss", "grad_norm"))
        tokens = sum(self._rows[row] for row in rows)
        return Round(self._watch.seconds, self._watch.cpu_seconds, tokens, loss, norm, phases)


def free_port() -> str:
    """One that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def _share(feed: Any) -> Any:
    return feed._part


def _phases(lines: list[dict[str, float]]) -> list[str]:
    names = {name.removeprefix("time/") for line in lines for name in line if name.startswith("time/")}
    return sorted(names - {"checkpoint", "evaluation"})


if __name__ == "__main__":
    serve(Ours)
