"""Starts torchrun for this node's ranks, and gathers what they left. Called by the launcher."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from posttrain_api.reasons import Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.environment import Node
from posttrain_trainer.linux import out_of_memory_kills
from posttrain_trainer.logs import RANK_TEMPLATE
from posttrain_trainer.record import ENDS_DIR, ENV_ATTEMPT, clear_ends, read_ends
from posttrain_trainer.reporter import Reporter
from posttrain_trainer.signs import ENV_SIGNS
from posttrain_trainer.silence import Silence
from posttrain_trainer.silence import longest as silence_of
from posttrain_trainer.supervise import Supervisor
from posttrain_trainer.verdict import Seen
from posttrain_trainer.vigil import Limits, Vigil, signs_folder

ENV_WORKER = "POSTTRAIN_WORKER_MODULE"
"""Another module than the worker, for tests of the launcher."""
WORKER = "posttrain_trainer.worker"
RENDEZVOUS_SECONDS = 1800
"""Node 0 prepares and pauses before it listens; the others wait for it so long."""
GRACE_RESERVE_SECONDS = 5
"""Of the grace period, kept to reap, to write the last word and to end."""
SILENT_SECONDS = 5.0
"""Told to stop, a node waits so long for one that it does not hear; then it leaves without the last save."""
BROKEN_SECONDS = 60.0
"""A rank that failed for good ends the attempt: ranks that hang in a dead group are given so long, then killed."""
_SECRET = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "GOOGLE_APPLICATION_CREDENTIALS"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)
_POD_LEVEL = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
"""The training-operator counts pods in them: torchrun sets its own for the ranks."""


def child_environment(environment: Mapping[str, str], config: TrainerConfig, attempt: int, cpu: bool) -> dict[str, str]:
    """The ranks' environment: no hub, no token or key, the attempt's number (0: not known on this node), the device."""
    kept = {key: value for key, value in environment.items() if key not in (*_SECRET, *_POD_LEVEL)}
    kept |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    kept[ENV_SIGNS] = str(signs_folder(config))
    if attempt:
        kept[ENV_ATTEMPT] = str(attempt)
    kept.setdefault("HF_HOME", str(Path(config.work_dir) / "huggingface"))
    kept.setdefault("TOKENIZERS_PARALLELISM", "false")
    if cpu:
        # Also where a GPU is there: the job did not ask for it.
        kept |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    kept.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // config.topology.processes_per_node)))
    return kept


def torchrun_arguments(config: TrainerConfig, node: Node, module: str) -> list[str]:
    """torchrun's arguments. Static rendezvous, no restarts of its own: an attempt is all ranks or none."""
    port = node.master_port if node.master_port is not None else _free_port()
    return [
        f"--nnodes={node.count}",
        f"--nproc-per-node={config.topology.processes_per_node}",
        f"--node-rank={node.rank}",
        f"--master-addr={node.master_address}",
        f"--master-port={port}",
        "--rdzv-backend=static",
        f"--rdzv-conf=timeout={RENDEZVOUS_SECONDS}",
        "--max-restarts=0",
        f"--shutdown-timeout={max(1, config.grace_seconds - GRACE_RESERVE_SECONDS)}",
        "--tee=3",
        f"--log-dir={Path(config.work_dir) / 'logs'}",
        f"--log-line-prefix-template={RANK_TEMPLATE}",
        "-m",
        module,
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class _Watch:
    """Ends a group that cannot go on: a rank has failed for good and others still run, or we are to stop and a node
    that the last save needs is silent."""

    work_dir: str
    ranks: Sequence[int]
    beats: Path
    supervisor: Supervisor
    failed_since: float | None = field(default=None)
    stopping_since: float | None = field(default=None)
    silence: Silence | None = field(default=None)

    def __call__(self) -> bool:
        return not self._is_broken() and not self._is_cut_off()

    def _is_cut_off(self) -> bool:
        if not self.supervisor.stopping:
            return False
        self.stopping_since = self.stopping_since or time.monotonic()
        silence = silence_of(self.beats)
        if silence is None or min(silence.seconds, time.monotonic() - self.stopping_since) < SILENT_SECONDS:
            return False
        self.silence = silence
        return True

    def _is_broken(self) -> bool:
        ends = read_ends(self.work_dir, self.ranks).values()
        failed = any(end.reason not in (None, Reason.PREEMPTED) for end in ends)
        if failed and self.failed_since is None:
            self.failed_since = time.monotonic()
        return self.failed_since is not None and time.monotonic() - self.failed_since >= BROKEN_SECONDS


def run_ranks(
    config: TrainerConfig, node: Node, environment: Mapping[str, str], supervisor: Supervisor, reporter: Reporter
) -> Seen:
    """Runs this node's ranks to their end and returns all that is known about it."""
    per_node = config.topology.processes_per_node
    ranks = range(node.rank * per_node, (node.rank + 1) * per_node)
    folder = Path(config.work_dir) / ENDS_DIR
    folder.mkdir(parents=True, exist_ok=True)
    clear_ends(config.work_dir, ranks)
    exits, beats = (folder / f"node-{node.rank}.{ending}" for ending in ("json", "beats"))
    for file in (exits, beats):
        file.unlink(missing_ok=True)
    kills = out_of_memory_kills()
    arguments = torchrun_arguments(config, node, environment.get(ENV_WORKER, WORKER))
    command = [sys.executable, "-m", "posttrain_trainer.elastic", str(exits), str(beats), *arguments]
    watch = _Watch(config.work_dir, ranks, beats, supervisor)
    vigil = Vigil(config, ranks, supervisor, reporter, Limits.of(environment))
    code = supervisor.run(command, environment, lambda: vigil() and watch())
    vigil.tell()  # what rank 0 has said since the last look
    exit_time, exit_codes = _exits(exits)
    return Seen(
        ranks=ranks,
        code=code,
        ends=read_ends(config.work_dir, ranks),
        exits=exit_codes,
        exits_time=exit_time,
        stopped=supervisor.stopping,
        memory_kills=out_of_memory_kills() - kills,
        silence=watch.silence,
        hang=vigil.hang,
    )


def _exits(path: Path) -> tuple[str | None, dict[int, int]]:
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # every rank ended with 0, or torchrun itself was killed
        return None, {}
    return value["time"], {int(rank): int(code) for rank, code in value["ranks"].items()}
