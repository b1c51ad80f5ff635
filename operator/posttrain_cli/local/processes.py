"""Launcher processes in the place of pods: one for each node of the plan, on loopback.

Each gets the environment that a pod gets: the plan's, its own name, and the rendezvous variables that the
training-operator sets. They end by SIGTERM and their grace period, as pods do. This module knows no jobs and no status.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain_api import names
from posttrain_operator.plan.types import Plan

LAUNCHER = "posttrain_trainer"
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES")
_HUB = ("HF_", "AWS_", "GOOGLE_", "GCS_", "HTTP", "http", "no_proxy", "NO_PROXY", "SSL_", "REQUESTS_")


@dataclass(frozen=True)
class Pod:
    """One launcher: its log, and the file for its last word (the termination message of a pod)."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    last_word: Path


def start(plan: Plan, folder: Path) -> list[Pod]:
    """Starts every node's launcher. `folder` receives config, logs and last words of this run."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / names.CONFIG_FILE
    config.write_text(plan.config.to_json())
    rendezvous = free_port()
    return [_start_one(plan, folder, node, rendezvous) for node in range(plan.config.topology.nodes)]


def _start_one(plan: Plan, folder: Path, node: int, rendezvous: int) -> Pod:
    name = pod_name(plan.config.job.name, node)
    log, last_word = folder / f"{name}.log", folder / f"{name}.end.json"
    last_word.unlink(missing_ok=True)
    own = {
        names.ENV_CONFIG: str(folder / names.CONFIG_FILE),
        names.ENV_POD_NAME: name,
        names.ENV_NODE_NAME: socket.gethostname(),
        names.ENV_TERMINATION_LOG: str(last_word),
        names.ENV_METRICS_PORT: str(free_port()),
        "HF_HOME": os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface")),  # what is there already
    }
    environment = {**inherited(os.environ), **plan.env, **rendezvous_variables(plan, node, rendezvous), **own}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", LAUNCHER],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us alone: we pass it on as SIGTERM
        )
    return Pod(name, process, log, last_word)


def pod_name(job: str, node: int) -> str:
    """As the training-operator names pods."""
    return f"{job}-master-0" if node == 0 else f"{job}-worker-{node - 1}"


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """What a launcher takes over from the caller: where programs are, and how the hub and buckets are reached."""
    return {key: value for key, value in environment.items() if key in _KEPT or key.startswith(_HUB)}


def rendezvous_variables(plan: Plan, node: int, port: int) -> dict[str, str]:
    """As the training-operator (v1.9) sets them for a job that is not elastic: RANK and WORLD_SIZE count pods there."""
    topology = plan.config.topology
    return {
        "PET_NNODES": str(topology.nodes),
        "PET_NPROC_PER_NODE": str(topology.processes_per_node),
        "PET_NODE_RANK": str(node),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """A TCP port of loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def running(pods: Sequence[Pod]) -> bool:
    """Whether any launcher still runs."""
    return any(pod.process.poll() is None for pod in pods)


def failed(pods: Sequence[Pod]) -> bool:
    """Whether any launcher has ended with another code than 0."""
    return any(pod.process.poll() not in (None, 0) for pod in pods)


def stop(pods: Sequence[Pod], grace_seconds: float) -> None:
    """SIGTERM to all; SIGKILL to whole process groups that still run after the grace period, or when interrupted."""
    for pod in pods:
        if pod.process.poll() is None:
            pod.process.terminate()
    try:
        deadline = time.monotonic() + grace_seconds
        while running(pods) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for pod in pods:
            with contextlib.suppress(ProcessLookupError):  # the usual case: the group has ended
                os.killpg(pod.process.pid, signal.SIGKILL)
            pod.process.wait()
