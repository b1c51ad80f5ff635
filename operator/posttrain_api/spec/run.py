"""Where and how long the job runs: resources, placement, environment, storage, deadlines."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from posttrain_api.names import STALL_SECONDS
from posttrain_api.spec.fields import ObjectName, Quantity, SpecModel, optional, required

YEAR = 31_536_000
LabelKey = Annotated[str, Field(min_length=1, max_length=317)]
LabelValue = Annotated[str, Field(max_length=63)]


class Storage(SpecModel):
    """The volume for checkpoints and output, without which a restart would lose the model: one that is there
    (claimName), or one that is made for the job (size)."""

    claim_name: ObjectName | None = optional(
        "PersistentVolumeClaim of the job's namespace, ReadWriteMany where the job has several "
        "nodes. The job writes to <job name>/<uid>/ on it",
        default="one is made, of `size`",
        example="runs",
    )
    size: Quantity | None = optional(
        "Make a PersistentVolumeClaim of this size, named like the job. One that an earlier job of this name has left "
        "is used again as it is",
        unit="bytes",
        default="claimName names one that is there",
        example="200Gi",
    )
    storage_class_name: ObjectName | None = optional(
        "StorageClass of the claim that is made", default="the cluster's", example="shared"
    )
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] | None = optional(
        "Access mode of the claim that is made. ReadWriteOnce is for one node",
        default="ReadWriteMany for several nodes, else ReadWriteOnce",
        example="ReadWriteMany",
    )
    retain: bool | None = optional(
        "Whether the claim that is made stays when the job is deleted, checkpoints and model with it",
        default="true",
        example=False,
    )


class Toleration(SpecModel):
    """As in a pod: which taint of a node is tolerated."""

    key: LabelKey | None = optional("Key of the taint", default="every key (operator Exists)", example="nvidia.com/gpu")
    operator: Literal["Equal", "Exists"] | None = optional(
        "How key and value are compared", default="Equal", example="Exists"
    )
    value: LabelValue | None = optional("Value of the taint (operator Equal)", default="empty", example="present")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = optional(
        "Effect of the taint", default="every effect", example="NoSchedule"
    )
    toleration_seconds: int | None = optional(
        "How long a NoExecute taint is tolerated", unit="seconds", default="for ever", example=300, ge=0, le=YEAR
    )


class Resources(SpecModel):
    """What each pod gets; requests equal limits. One pod per node."""

    nodes: int | None = optional(
        "Number of pods, each on its own share of a node", default="1", example=2, ge=1, le=1024
    )
    gpus_per_node: int | None = optional(
        "GPUs of each pod, one process for each; 0 is a run on the CPU and needs processesPerNode",
        default="1",
        example=8,
        ge=0,
        le=64,
    )
    processes_per_node: int | None = optional(
        "Processes of each pod of a CPU run (gpusPerNode 0 only)", default="one per GPU", example=2, ge=1, le=64
    )
    gpu_resource_name: str | None = optional(
        "Name of the extended resource that a GPU is",
        default="nvidia.com/gpu",
        example="nvidia.com/gpu",
        min_length=3,
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
    )
    cpu: Quantity | None = optional("CPU cores of each pod", default="8 per GPU; CPU run: 1 per process", example=16)
    memory: Quantity | None = optional(
        "Memory of each pod, sharedMemory included",
        unit="bytes",
        default="64Gi per GPU; CPU run: 2Gi per process",
        example="256Gi",
    )
    shared_memory: Quantity | None = optional(
        "Size of /dev/shm, counted in memory",
        unit="bytes",
        default="16Gi, at most half of memory; CPU run: 1Gi",
        example="32Gi",
    )
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=16)] | None = optional(
        "Labels a node must have", default="any node", example={"node.kubernetes.io/instance-type": "p5.48xlarge"}
    )
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16)] | None = optional(
        "Taints of nodes that are tolerated", default="none", example=[{"key": "nvidia.com/gpu", "operator": "Exists"}]
    )
    priority_class_name: ObjectName | None = optional(
        "PriorityClass of the pods", default="the cluster's", example="high-priority"
    )
    scheduler_name: ObjectName | None = optional(
        "Scheduler of the pods", default="the cluster's", example="default-scheduler"
    )


class PullSecret(SpecModel):
    """A Secret that pulls the image."""

    name: ObjectName = required(
        "Name of a Secret of type kubernetes.io/dockerconfigjson in the job's namespace", example="registry"
    )


class EnvVar(SpecModel):
    """A literal environment variable of the trainer. Secrets do not belong here: use secretRef of the source."""

    name: str = required(
        "Name of the variable. Refused: names of secrets (…TOKEN, …SECRET, …PASSWORD, …API_KEY, "
        "…ACCESS_KEY) and what the job itself sets "
        "(PET_*, MASTER_*, RANK, WORLD_SIZE, LOCAL_RANK, POSTTRAIN_*)",
        example="NCCL_DEBUG",
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
    value: str = required("Its value, as it is", example="WARN", max_length=4096)


RESTARTS: Final = {"total": 10, "outOfMemory": 1, "hang": 3, "processKilled": 3, "trainerError": 1}
"""The built-in budgets. Not in the plan's table: they are editable while the job runs."""


def _budget(name: str, cause: str) -> Any:
    text = f"Restarts because {cause}, counted anew after each later checkpoint; 0 means never"
    return optional(text, default=str(RESTARTS[name]), example=RESTARTS[name], ge=0, le=1000)


class RestartPolicy(SpecModel):
    """How often the whole job is restarted from its last checkpoint. Preemption and lost nodes use up nothing."""

    total: int | None = optional(
        "Restarts in the whole life of the job, whatever their causes",
        default=str(RESTARTS["total"]),
        example=20,
        ge=0,
        le=1000,
    )
    out_of_memory: int | None = _budget("outOfMemory", "the kernel killed a process for memory")
    hang: int | None = _budget("hang", "training stood still")
    process_killed: int | None = _budget("processKilled", "a process was ended by a signal")
    trainer_error: int | None = _budget("trainerError", "of an error that the trainer does not know")


class RunPolicy(SpecModel):
    """Deadlines, restarts and cleaning up. Editable while the job runs, except terminationGracePeriodSeconds."""

    active_deadline_seconds: int | None = optional(
        "The job fails (DeadlineExceeded) after so much time with its pods admitted, over all attempts",
        unit="seconds",
        default="none",
        example=86400,
        ge=1,
        le=YEAR,
    )
    startup_deadline_seconds: int | None = optional(
        "The job fails (StartupTimeout) where training has not begun after so much time",
        unit="seconds",
        default="none",
        example=3600,
        ge=1,
        le=YEAR,
    )
    ttl_seconds_after_finished: int | None = optional(
        "Pods and child objects are deleted so long after the end; the job itself, its storage and its model stay",
        unit="seconds",
        default="never",
        example=86400,
        ge=0,
        le=YEAR,
    )
    termination_grace_period_seconds: int | None = optional(
        "What a stopped pod has to save its state",
        unit="seconds",
        default="600; with model.scratch from its size",
        example=900,
        ge=1,
        le=86400,
    )
    stall_seconds: int | None = optional(
        "Training that has not got on for so long while its pods are alive hangs: their stacks are collected, and the "
        "job is restarted from its last checkpoint. More than the longest time between two micro-batches, pieces of a "
        "rollout, or files of a save",
        unit="seconds",
        default=str(STALL_SECONDS),
        example=3600,
        ge=10,
        le=YEAR,
    )
    restarts: RestartPolicy | None = optional(
        "How often the job is restarted, by cause", default="10 in all, fewer for each cause", example={"total": 20}
    )
