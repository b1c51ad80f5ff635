"""The jobs of `slow_storage`: what they are, how they are run, and what they leave."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, read_rows, write_case
from benchmarks.slow_disk import Storage, note
from posttrain_api import names
from posttrain_api.job import parse_job
from posttrain_cli.local.runner import log_tail, run_plan
from posttrain_cli.local.workspace import Workspace
from posttrain_operator.plan.build import build_plan
from posttrain_trainer import checkpoint_files as files
from posttrain_trainer.metrics import read_metrics

UID, DAY = "u1", 86400
WARM_UP = 2
"""Steps that are slower than the others and do not count as steps."""


@dataclass(frozen=True)
class Shape:
    """What is trained, and how often it is saved. `save_steps`: so many steps' time a straight save takes."""

    steps: int = 40
    every: int = 10
    hidden: int = 512
    layers: int = 3
    ranks: int = 2
    save_steps: float = 5.0
    batch: int = 8

    @property
    def saves(self) -> int:
        """Of a job that saves on its way, the last one included."""
        return -(-self.steps // self.every)


@dataclass(frozen=True)
class Measured:
    """One job. `seconds`: from the begin of the loop to the last commit; `manifests` by step; `weights`: digest."""

    seconds: float
    lines: list[dict[str, float]]
    manifests: dict[int, files.Manifest]
    weights: str

    @property
    def save_seconds(self) -> list[float]:
        """Of each manifest, in order of steps."""
        return [self.manifests[step].save_seconds or 0.0 for step in sorted(self.manifests)]

    @property
    def last_save(self) -> float:
        """Seconds of the save at the end: it has no line in metrics.jsonl."""
        return self.save_seconds[-1]

    @property
    def on_the_way(self) -> float:
        """Seconds that the saves before the last one took from training."""
        return sum(line.get("time/checkpoint", 0.0) for line in self.lines)

    @property
    def stood_still(self) -> float:
        """Seconds that all saves took from training."""
        return self.on_the_way + self.last_save

    def steps(self, copying: bool) -> list[float]:
        """Seconds of the steps that lie wholly inside a copy, or wholly outside of all."""
        inside, outside = [], list[float]()
        for step, line in enumerate(self.lines[WARM_UP:], WARM_UP + 1):
            begun, ended = self._since_save(step)
            took = self._save_before(step)
            if ended <= took:
                inside.append(line["step_time"])
            elif begun >= took:
                outside.append(line["step_time"])
        return inside if copying else outside

    def _save_before(self, step: int) -> float:
        saved = max((saved for saved in self.manifests if saved < step), default=0)
        return (self.manifests[saved].save_seconds or 0.0) if saved else 0.0

    def _since_save(self, step: int) -> tuple[float, float]:
        """Begin and end of a step, in seconds since the begin of the save before it."""
        saved = max((saved for saved in self.manifests if saved < step), default=0)
        seconds = [line["step_time"] + line.get("time/checkpoint", 0.0) for line in self.lines[saved:step]]
        return sum(seconds) - self.lines[step - 1]["step_time"], sum(seconds)


def write_data(volumes: Path, shape: Shape) -> None:
    """Model and rows as the claim `data`: rows of 64 tokens, so that steps take about the same time."""
    folder = volumes / "data"
    folder.mkdir(parents=True)
    (volumes / "runs").mkdir()
    size = (16 * shape.batch, shape.batch, 2048, shape.hidden, shape.layers)
    case = Case("SFT", str(folder), *size, max_length=128, threads=1, prompt=16, answer=47, spread=0.0)
    write_case(case)
    texts = [(_text(row["prompt"]), " " + _text(row["answers"][0][:-1])) for row in read_rows(case)]
    lines = [json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in texts]
    (folder / "rows.jsonl").write_text("".join(lines))


def _text(words: Sequence[int]) -> str:
    return " ".join(map(str, words))


def manifest(name: str, shape: Shape, checkpoint: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """The job."""
    training = {"maxSteps": shape.steps, "batchSize": shape.batch, "learningRate": 1e-4, "tokensPerMicroBatch": 2048}
    spec = {
        "stage": "SFT",
        "tuning": "Full",
        "model": {"uri": "pvc://data/model"},
        "data": {"train": [{"uri": "pvc://data/rows.jsonl"}], "maxLength": 128},
        "training": training,
        "checkpoint": {"everySeconds": DAY, "keepLast": shape.saves, **checkpoint},
        "resources": {"gpusPerNode": 0, "processesPerNode": shape.ranks},
        "storage": {"claimName": "runs"},
        "env": [{"name": key, "value": value} for key, value in {"OMP_NUM_THREADS": "1", **environment}.items()],
    }
    metadata = {"name": name, "uid": UID}
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": metadata, "spec": spec}


def run(name: str, shape: Shape, checkpoint: dict[str, Any], storage: Storage) -> Measured:
    """One job to its end. SystemExit where it fails."""
    workspace = Workspace(storage.folder, storage.folder / "volumes")
    root = workspace.volumes / "runs" / name / UID
    job = parse_job(manifest(name, shape, checkpoint, storage.environment(root / names.CHECKPOINTS_DIR)))
    plan = build_plan(job, workspace.settings(name, "runs", allow_cpu=True), {})
    begun: list[float] = []
    threading.Thread(target=_see, args=(Path(plan.config.run_dir) / names.METRICS_FILE, begun), daemon=True).start()
    with open(os.devnull, "w") as nowhere:
        status = run_plan(plan, workspace.job(name), nowhere)
    if status["state"] != "Succeeded":
        logs = "\n".join(map(log_tail, workspace.job(name).glob("*.log")))
        raise SystemExit(f"{logs}\nslow_storage: job {name}: {status.get('reason')}: {status['message']}")
    measured = read(Path(plan.config.run_dir), begun[0])
    note(f"{name}: {measured.seconds:.1f} s")
    return measured


def _see(file: Path, begun: list[float]) -> None:
    """When `file` comes into being: the loop opens metrics.jsonl just before its first step."""
    while not file.exists():
        time.sleep(0.02)
    begun.append(time.time())


def read(run_dir: Path, begun: float) -> Measured:
    """What a job has left. The last commit ends with the record beside the checkpoints."""
    seconds = (run_dir / names.COMMITTED_FILE).stat().st_mtime - begun
    saved = files.committed(run_dir / names.CHECKPOINTS_DIR)
    weights = [files.file_digest(path) for path in sorted((run_dir / names.OUTPUT_DIR).rglob("*.safetensors"))]
    manifests = {entry.manifest.step: entry.manifest for entry in saved}
    return Measured(seconds, read_metrics(run_dir / names.METRICS_FILE), manifests, " ".join(weights))
