"""What each pod gets: shape of the world, resources, placement, environment, grace."""

from __future__ import annotations

import math

from posttrain_api import names
from posttrain_api.spec.run import Resources as ResourcesSpec
from posttrain_api.trainer import Scratch, Topology
from posttrain_operator.plan import defaults
from posttrain_operator.plan.context import Context
from posttrain_operator.plan.errors import refuse
from posttrain_operator.plan.model import parameters_of
from posttrain_operator.plan.quantities import GI, read_quantity, write_bytes
from posttrain_operator.plan.types import NewClaim, Placement, Resources

BYTES_PER_PARAMETER = 16
"""Of a checkpoint at most, in fp32: the model's weight, the optimizer's own copy of it (ZeRO 1 and 2) and AdamW's two
moments."""
SAVE_BYTES_PER_SECOND = 100 * 10**6
"""What a slow shared volume takes."""
GRACE_FLOOR = 60


def topology(context: Context) -> Topology:
    """nodes x processes; one process for each GPU, or as said for a run on the CPU."""
    said = context.spec.resources or ResourcesSpec()
    gpus = 1 if said.gpus_per_node is None else said.gpus_per_node
    return Topology(nodes=said.nodes or 1, processes_per_node=gpus or said.processes_per_node or 1, gpus_per_node=gpus)


def resources(context: Context, world: Topology) -> Resources:
    """Requests = limits. /dev/shm counts as memory, so it must fit: PlanError(InvalidSpec) where it does not."""
    said = context.spec.resources or ResourcesSpec()
    memory = said.memory if said.memory is not None else _default_memory(world)
    total = read_quantity(memory)
    shared = said.shared_memory if said.shared_memory is not None else _default_shared(world, int(total))
    if read_quantity(shared) >= total:
        raise refuse(
            "spec.resources.sharedMemory",
            f"must be less than memory ({memory}), which it is counted in",
            shared,
            "choose less, or give the pods more memory",
        )
    return Resources(
        cpu=str(said.cpu if said.cpu is not None else _default_cpu(world)),
        memory=str(memory),
        gpus=world.gpus_per_node,
        gpu_resource_name=said.gpu_resource_name or defaults.GPU_RESOURCE_NAME,
        shared_memory=str(shared),
    )


def _default_cpu(world: Topology) -> int:
    return world.gpus_per_node * defaults.CPU_PER_GPU or world.processes_per_node * defaults.CPU_PER_PROCESS


def _default_memory(world: Topology) -> str:
    gib = (
        world.gpus_per_node * defaults.MEMORY_GIB_PER_GPU or world.processes_per_node * defaults.MEMORY_GIB_PER_PROCESS
    )
    return f"{gib}Gi"


def _default_shared(world: Topology, memory: int) -> str:
    usual = defaults.SHARED_MEMORY_GIB if world.gpus_per_node else defaults.SHARED_MEMORY_GIB_CPU
    return write_bytes(min(usual * GI, memory // 2))


def placement(context: Context) -> Placement:
    """As the spec says it."""
    said, spec = context.spec.resources or ResourcesSpec(), context.spec
    return Placement(
        node_selector=dict(said.node_selector or {}),
        tolerations=tuple(toleration.to_wire() for toleration in said.tolerations or ()),
        priority_class_name=said.priority_class_name,
        scheduler_name=said.scheduler_name,
        service_account_name=spec.service_account_name,
        image_pull_secrets=tuple(secret.name for secret in spec.image_pull_secrets or ()),
    )


def grace_seconds(context: Context, shape: Scratch | None) -> int:
    """Said, or 600; for a model from scratch the time its checkpoint takes on a slow volume, and never below 60."""
    policy = context.spec.run_policy
    if policy and policy.termination_grace_period_seconds is not None:
        return policy.termination_grace_period_seconds
    if shape is None:
        return defaults.GRACE_SECONDS
    return GRACE_FLOOR + math.ceil(parameters_of(shape) * BYTES_PER_PARAMETER / SAVE_BYTES_PER_SECOND)


def new_claim(context: Context) -> NewClaim | None:
    """The claim that is to be made, None where one is named."""
    said = context.spec.storage
    if said.size is None:
        return None
    usual = "ReadWriteMany" if topology(context).nodes > 1 else "ReadWriteOnce"
    return NewClaim(
        size=str(said.size),
        storage_class_name=said.storage_class_name,
        access_mode=said.access_mode or usual,
        retain=said.retain is not False,
    )


def stall_seconds(context: Context) -> int:
    """Said, or the built-in."""
    policy = context.spec.run_policy
    return names.STALL_SECONDS if policy is None or policy.stall_seconds is None else policy.stall_seconds


def environment(context: Context, world: Topology, pod: Resources) -> dict[str, str]:
    """The trainer's environment as far as the plan knows it; the user's literals last, so that they win where they
    may."""
    settings, work = context.settings, context.settings.work_dir
    env = {
        names.ENV_CONFIG: f"{names.CONFIG_DIR}/{names.CONFIG_FILE}",
        names.ENV_METRICS_PORT: str(settings.metrics_port),
        names.ENV_STALL_SECONDS: str(stall_seconds(context)),
        names.ENV_TERMINATION_LOG: names.TERMINATION_LOG,
        "HF_HOME": f"{work}/huggingface",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HOME": work,
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": work,
        "TORCHINDUCTOR_CACHE_DIR": f"{work}/inductor",
        "TRITON_CACHE_DIR": f"{work}/triton",
        "XDG_CACHE_HOME": f"{work}/cache",
    }
    if settings.allow_cpu:
        env[names.ENV_ALLOW_CPU] = "true"
    if world.gpus_per_node == 0:
        threads = max(1, int(read_quantity(pod.cpu)) // world.processes_per_node)
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    return dict(sorted(env.items())) | {variable.name: variable.value for variable in context.spec.env or ()}
