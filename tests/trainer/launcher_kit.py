"""Launchers as real processes with real torchrun and stub ranks, for the tests of several files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prepare_kit import job, write_config

from posttrain_api import names
from posttrain_api.records import DataReport, Failure, Resolved, Success, parse_termination
from posttrain_api.trainer import Topology, TrainerConfig
from posttrain_trainer.prepared import Prepared, write_manifest

Actions = Mapping[int, list[Any]]


class Pod:
    """One launcher process, with its termination message and output in files."""

    def __init__(self, folder: Path, config: TrainerConfig, env: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config = config
        self.termination = folder / "termination-log"
        self.output = folder / "output"
        path = write_config(config, folder)
        base = {key: value for key, value in os.environ.items() if not key.startswith(("PET_", "HF_"))}
        full = {
            **base,
            names.ENV_CONFIG: str(path),
            names.ENV_TERMINATION_LOG: str(self.termination),
            "POSTTRAIN_WORKER_MODULE": "stub_worker",
            "POSTTRAIN_BACKOFF_SCALE": "0",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            **env,
        }
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "posttrain_trainer"], env=full, stdout=out, stderr=out, start_new_session=True
            )

    def end(self, timeout: float = 240) -> tuple[int, Failure | Success | None]:
        code = self.process.wait(timeout)
        text = self.termination.read_text() if self.termination.exists() else None
        return code, parse_termination(text)

    def wait_for(self, *files: str, timeout: float = 180) -> None:
        paths = [Path(self.config.run_dir) / name for name in files]
        deadline = time.monotonic() + timeout
        while not all(path.exists() and path.stat().st_size for path in paths):
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)

    def wait_to_say(self, text: str, timeout: float = 180) -> None:
        deadline = time.monotonic() + timeout
        while text not in self.output.read_text():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)


def manifest(config: TrainerConfig) -> None:
    folder = Path(config.run_dir) / names.PREPARED_DIR
    folder.mkdir(parents=True, exist_ok=True)
    resolved = Resolved(zero_stage=0, warmup_steps=0, total_steps=1, precision="FP32", attention="SDPA")
    report = DataReport(rows=1, used=1, tokens=2)
    fields = dict.fromkeys(("model_dir", "model_digest", "tokenizer_dir", "train_dir", "data_digest"), "x")
    write_manifest(folder, Prepared(config_digest=config.digest(), data_report=report, resolved=resolved, **fields))


Start = Callable[..., Pod]


@contextlib.contextmanager
def launchers(tmp_path: Path) -> Iterator[Start]:
    """Starts them; what still runs at the end is killed."""
    pods: list[Pod] = []

    def begin(
        actions: Actions, nodes: int = 1, node: int = 0, prepared: bool = True, grace: int = 8, **env: str
    ) -> Pod:
        topology = Topology(nodes=nodes, processes_per_node=len(actions) // nodes, gpus_per_node=0)
        config = job(tmp_path, tmp_path / "train.jsonl", topology=topology, grace_seconds=grace)
        if prepared:
            manifest(config)
        stub = {"STUB": json.dumps({str(rank): list(todo) for rank, todo in actions.items()})}
        pods.append(Pod(tmp_path / f"pod-{node}", config, {**stub, **env}))
        return pods[-1]

    try:
        yield begin
    finally:
        for pod in pods:
            if pod.process.poll() is None:
                for pid in all_of(pod.process.pid):
                    with contextlib.suppress(ProcessLookupError):  # it has just ended
                        os.kill(pid, signal.SIGKILL)
                pod.process.wait()


def failure_of(pod: Pod) -> Failure:
    code, word = pod.end()
    assert isinstance(word, Failure), pod.output.read_text()
    assert word.exit_code == code
    return word


def all_of(pid: int) -> list[int]:
    """A process and its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def two_nodes() -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
