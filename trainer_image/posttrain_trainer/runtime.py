"""The process a rank runs in: device, threads, seeds, process groups, signals.

Made once by the worker, before DeepSpeed is imported. A signal handler only sets a flag: what to do about it is
decided by all ranks together, in the loop. `Control` is a gloo group of its own for small numbers on the CPU, so
that agreeing on something never waits for the accelerator.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from posttrain_api.names import ENV_ALLOW_CPU, ENV_STALL_SECONDS, STALL_SECONDS
from posttrain_api.reasons import Reason
from posttrain_api.trainer import Topology
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.signs import mark

GROUP_TIMEOUT = timedelta(minutes=30)
CONTROL_TIMEOUT = timedelta(hours=2)
"""Rank 0 may write an export for long while the others wait."""
AFTER_STALL = timedelta(minutes=15)
"""A group waits so much longer than a hang takes to be found: its own error has no stacks, and names no rank."""


class StopFlag:
    """Set by SIGTERM and SIGINT; read by the loop."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Only the main thread may do this."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


class Control:
    """Small agreements between ranks, in float64 on the CPU. With one rank nothing is sent. Where one has come about,
    every rank was there: the job got on."""

    def __init__(self, group: dist.ProcessGroup | None, ranks: int) -> None:
        self._group = group
        self._ranks = ranks

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Element-wise maximum over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so: every rank gets the same answer."""
        return self.max([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value, in order of rank."""
        if self._ranks == 1:
            return [value]
        values: list[Any] = [None] * self._ranks
        dist.all_gather_object(values, value, group=self._group)
        mark()
        return values

    def barrier(self) -> None:
        """Returns when every rank is here."""
        self.sum([0.0])

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self._ranks == 1:
            mark()
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=operation, group=self._group)
        mark()
        return [float(value) for value in tensor.tolist()]


@dataclass(frozen=True)
class Runtime:
    """Who and where this rank is."""

    rank: int
    local_rank: int
    ranks: int
    device: torch.device
    control: Control
    stop: StopFlag

    @property
    def first(self) -> bool:
        """Rank 0 writes what is written once."""
        return self.rank == 0


def start(topology: Topology, seed: int) -> Runtime:
    """Device, threads, seed, groups and signals, from torchrun's environment. TrainerFailure where a GPU is asked for
    and none is there."""
    rank, local_rank, ranks = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = _device(topology, local_rank)
    stop = StopFlag()
    stop.install()
    prepare_process(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    seed_all(seed + rank)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience(GROUP_TIMEOUT))
    group: Any = dist.new_group(backend="gloo", timeout=patience(CONTROL_TIMEOUT)) if ranks > 1 else None
    return Runtime(rank, local_rank, ranks, device, Control(group, ranks), stop)


def patience(least: timedelta) -> timedelta:
    """How long a collective waits for a rank."""
    stall = timedelta(seconds=float(os.environ.get(ENV_STALL_SECONDS, STALL_SECONDS)))
    return max(least, stall + AFTER_STALL)


def prepare_process(device: torch.device, local_ranks: int) -> None:
    """Chooses DeepSpeed's accelerator (read once, at its import) and the number of threads."""
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, usable_cores() // local_ranks))


def seed_all(seed: int) -> None:
    """Ranks get different seeds, so that dropout differs; the model is drawn from the job's seed alone (model.py)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def usable_cores() -> int:
    """Cores of this process: its affinity, or less where the container's CPU limit (cgroup v2) is lower."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # no cgroup v2, or no limit ("max"): the affinity holds
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _device(topology: Topology, local_rank: int) -> torch.device:
    if topology.gpus_per_node == 0:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    if os.environ.get(ENV_ALLOW_CPU) == "true":
        return torch.device("cpu")
    raise TrainerFailure(
        Reason.IMAGE_INCOMPATIBLE,
        f"resources.gpusPerNode is {topology.gpus_per_node}, but this container sees no CUDA device. "
        f"Check the node's driver and the image's CUDA version, "
        f"set gpusPerNode to 0 for a CPU job, or {ENV_ALLOW_CPU}=true to train on the CPU.",
    )
