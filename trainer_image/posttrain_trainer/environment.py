"""What a trainer process reads from its environment: the TrainerConfig, its place among the nodes, its devices.

PET_* and MASTER_* come from the child's kind (backends) or from a local run; without them it is one node. Nothing here
starts or writes anything.
"""

from __future__ import annotations

import glob
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from posttrain_api import names
from posttrain_api.reasons import Reason
from posttrain_api.trainer import CONTRACT, TrainerConfig
from posttrain_trainer.errors import TrainerFailure

Environment = Mapping[str, str]

DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd")
GPU_SECONDS = 300.0
"""How long torch may take to count the GPUs: a broken driver never answers."""
_COUNT = "import torch; print(torch.cuda.device_count())"


def load_config(environment: Environment) -> TrainerConfig:
    """The TrainerConfig that POSTTRAIN_CONFIG names. ImageIncompatible where this image cannot read it."""
    path = environment.get(names.ENV_CONFIG, f"{names.CONFIG_DIR}/{names.CONFIG_FILE}")
    try:
        value = json.loads(Path(path).read_text())
        contract = value.get("contract", CONTRACT)
    except (OSError, ValueError, AttributeError) as error:
        raise TrainerFailure(
            Reason.IMAGE_INCOMPATIBLE,
            f"{path}: no TrainerConfig can be read ({error}). The operator writes it: use an image and an operator "
            "of one "
            f"release, and set {names.ENV_CONFIG} to the file.",
        ) from error
    if contract != CONTRACT:
        raise TrainerFailure(
            Reason.IMAGE_INCOMPATIBLE,
            f"{path}: contract {contract}, this trainer image speaks {CONTRACT}. Use an image and an operator of one "
            "release.",
        )
    try:
        return TrainerConfig.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise TrainerFailure(
            Reason.IMAGE_INCOMPATIBLE,
            f"{path}: {place}: {first['msg']} ({error.error_count()} such fields). "
            "Use an image and an operator of one release.",
        ) from error


_OFFSET = (names.ENV_NODE_RANK_OFFSET,)


@dataclass(frozen=True)
class Node:
    """This pod among the job's: `rank` of `count` nodes, and where rank 0 listens (port None: any free one)."""

    rank: int
    count: int
    master_address: str
    master_port: int | None

    @property
    def first(self) -> bool:
        """Whether this node prepares, counts attempts and has rank 0."""
        return self.rank == 0


def node_of(environment: Environment, config: TrainerConfig) -> Node:
    """The node's place. ImageIncompatible where the environment and the TrainerConfig tell different sizes."""
    count = _number(environment, "PET_NNODES", default="1")
    per_node = environment.get("PET_NPROC_PER_NODE", "auto")
    topology = config.topology
    if count != topology.nodes:
        raise _mismatch("PET_NNODES", str(count), topology.nodes)
    if per_node.isdecimal() and int(per_node) != topology.processes_per_node:
        raise _mismatch("PET_NPROC_PER_NODE", per_node, topology.processes_per_node)
    if count == 1:
        port = environment.get("PET_MASTER_PORT")
        return Node(0, 1, "127.0.0.1", int(port) if port and port.isdecimal() else None)
    return Node(
        rank=_number(environment, "PET_NODE_RANK", "RANK") + _number(environment, *_OFFSET, default="0"),
        count=count,
        master_address=environment.get("PET_MASTER_ADDR") or environment.get("MASTER_ADDR") or "127.0.0.1",
        master_port=_number(environment, "PET_MASTER_PORT", "MASTER_PORT", default=str(names.RENDEZVOUS_PORT)),
    )


def _number(environment: Environment, *keys: str, default: str | None = None) -> int:
    found = next((environment[key] for key in keys if environment.get(key)), default)
    if found is None or not found.isdecimal():
        raise TrainerFailure(
            Reason.IMAGE_INCOMPATIBLE,
            f"{keys[0]} is {found!r}, it must be a number. The training-operator sets it; do not start the image by "
            "hand.",
        )
    return int(found)


def _mismatch(name: str, found: str, wanted: int) -> TrainerFailure:
    return TrainerFailure(
        Reason.IMAGE_INCOMPATIBLE,
        f"{name} is {found}, the TrainerConfig says {wanted}. Both come from one job: use an operator of this release.",
    )


def uses_cpu(environment: Environment, gpus: int) -> bool:
    """Whether the ranks run on the CPU: by wish (`gpus` 0), or because none is there and the platform allows it.

    ImageIncompatible where GPUs were asked for and fewer are seen.
    """
    if gpus == 0:
        return True
    seen = visible_gpus()
    if seen >= gpus:
        return False
    if seen == 0 and environment.get(names.ENV_ALLOW_CPU) == "true":
        return True
    raise TrainerFailure(
        Reason.IMAGE_INCOMPATIBLE,
        f"The job asks for {gpus} GPUs per pod (resources.gpusPerNode), this pod sees {seen}. Check the device "
        "plugin, the "
        "driver and the image's CUDA version; to train on the CPU set resources.gpusPerNode: 0.",
    )


def visible_gpus() -> int:
    """GPUs that torch can use here. Asked of torch, in a process of its own, only where a device file is there at
    all. ImageIncompatible where it gives no answer in time.
    """
    if not any(glob.glob(pattern) for pattern in DEVICE_FILES):
        return 0
    command = [sys.executable, "-c", _COUNT]
    try:
        counted = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GPU_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise TrainerFailure(
            Reason.IMAGE_INCOMPATIBLE,
            f"torch has not counted this pod's GPUs in {GPU_SECONDS:g} s. Check the node's driver (nvidia-smi).",
        ) from error
    text = counted.stdout.strip()
    return int(text) if text.isdecimal() else 0
