"""Why a job waits, restarts or failed: one table for operator, trainer and documentation.

A reason is what `kubectl get ptj -o wide` shows and what `docs/reasons/` explains. The trainer ends with the exit code
of its reason; the training-operator fails a job for good on 1–127 and recreates the pod on 128 and more, so the code
*is* the decision.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Effect(StrEnum):
    """What a reason does to the job."""

    SUSPENDED = "Suspended"
    STALLED = "Stalled"
    FAILED = "Failed"
    RESTART = "Restart"
    WARNING = "Warning"
    """An event only."""


class Budget(StrEnum):
    """Which counter of runPolicy.restarts a gang restart uses up; FREE uses none."""

    FREE = "free"
    TOTAL = "total"
    OUT_OF_MEMORY = "outOfMemory"
    HANG = "hang"
    PROCESS_KILLED = "processKilled"
    TRAINER_ERROR = "trainerError"


class Reason(StrEnum):
    """Every reason, named as it appears in conditions and events."""

    WAITING_FOR_DEPENDENCY = "WaitingForDependency"
    USER_SUSPENDED = "UserSuspended"
    GUARD_SUSPENDED = "GuardSuspended"

    STORAGE_NOT_FOUND = "StorageNotFound"
    CONFIG_MAP_NOT_FOUND = "ConfigMapNotFound"
    SECRET_NOT_FOUND = "SecretNotFound"
    BACKEND_MISSING = "BackendMissing"
    NAME_CONFLICT = "NameConflict"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    UNSCHEDULABLE = "Unschedulable"
    QUOTA_EXCEEDED = "QuotaExceeded"
    POD_SECURITY_DENIED = "PodSecurityDenied"

    INVALID_SPEC = "InvalidSpec"
    UNSUPPORTED = "Unsupported"
    DEPENDENCY_FAILED = "DependencyFailed"
    DEPENDENCY_CYCLE = "DependencyCycle"

    IMAGE_INCOMPATIBLE = "ImageIncompatible"
    MODEL_INCOMPATIBLE = "ModelIncompatible"
    MODEL_ACCESS_DENIED = "ModelAccessDenied"
    MODEL_NOT_FOUND = "ModelNotFound"
    DATASET_SCHEMA_INVALID = "DatasetSchemaInvalid"
    DATA_ROWS_REJECTED = "DataRowsRejected"
    NOTHING_TO_LEARN = "NothingToLearn"
    DATASET_NOT_FOUND = "DatasetNotFound"
    REWARD_ERROR = "RewardError"
    ROLLOUT_ERROR = "RolloutError"
    NON_FINITE = "NonFinite"
    GUARD_TRIPPED = "GuardTripped"
    CHECKPOINT_INCOMPATIBLE = "CheckpointIncompatible"
    STORAGE_FULL = "StorageFull"
    STORAGE_READ_ONLY = "StorageReadOnly"
    ACCELERATOR_OUT_OF_MEMORY = "AcceleratorOutOfMemory"

    OUT_OF_MEMORY = "OutOfMemory"
    PREEMPTED = "Preempted"
    PEER_LOST = "PeerLost"
    HANG = "Hang"
    PROCESS_KILLED = "ProcessKilled"
    NODE_LOST = "NodeLost"
    TRAINER_ERROR = "TrainerError"

    GRACE_PERIOD_TOO_SHORT = "GracePeriodTooShort"
    CHECKPOINT_REFUSED = "CheckpointRefused"
    GUARD_WARNED = "GuardWarned"
    SAMPLER_MISMATCH = "SamplerMismatch"
    NO_PROGRESS = "NoProgress"

    DEADLINE_EXCEEDED = "DeadlineExceeded"
    RESTART_BUDGET_EXHAUSTED = "RestartBudgetExhausted"
    STARTUP_TIMEOUT = "StartupTimeout"
    INTERNAL_ERROR = "InternalError"


@dataclass(frozen=True)
class ReasonInfo:
    """Effect of a reason, the trainer's exit code for it (None: not the trainer's to say), a restart's budget."""

    effect: Effect
    exit_code: int | None = None
    budget: Budget | None = None


_RETRYABLE = {
    Reason.OUT_OF_MEMORY: ReasonInfo(Effect.RESTART, 137, Budget.OUT_OF_MEMORY),
    Reason.PREEMPTED: ReasonInfo(Effect.RESTART, 143, Budget.FREE),
    Reason.PEER_LOST: ReasonInfo(Effect.RESTART, 160, Budget.TOTAL),
    Reason.HANG: ReasonInfo(Effect.RESTART, 161, Budget.HANG),
    Reason.PROCESS_KILLED: ReasonInfo(Effect.RESTART, 162, Budget.PROCESS_KILLED),
    Reason.NODE_LOST: ReasonInfo(Effect.RESTART, None, Budget.FREE),
    Reason.TRAINER_ERROR: ReasonInfo(Effect.RESTART, 190, Budget.TRAINER_ERROR),
}


def _table() -> dict[Reason, ReasonInfo]:
    suspended = dict.fromkeys((Reason.WAITING_FOR_DEPENDENCY, Reason.USER_SUSPENDED), ReasonInfo(Effect.SUSPENDED))
    stalled = dict.fromkeys(
        (
            Reason.STORAGE_NOT_FOUND,
            Reason.CONFIG_MAP_NOT_FOUND,
            Reason.SECRET_NOT_FOUND,
            Reason.BACKEND_MISSING,
            Reason.NAME_CONFLICT,
            Reason.IMAGE_PULL_FAILED,
            Reason.UNSCHEDULABLE,
            Reason.QUOTA_EXCEEDED,
            Reason.POD_SECURITY_DENIED,
        ),
        ReasonInfo(Effect.STALLED),
    )
    failed = dict.fromkeys(
        (
            Reason.INVALID_SPEC,
            Reason.UNSUPPORTED,
            Reason.DEPENDENCY_FAILED,
            Reason.DEPENDENCY_CYCLE,
            Reason.DEADLINE_EXCEEDED,
            Reason.RESTART_BUDGET_EXHAUSTED,
            Reason.STARTUP_TIMEOUT,
            Reason.INTERNAL_ERROR,
        ),
        ReasonInfo(Effect.FAILED),
    )
    permanent = {
        Reason.IMAGE_INCOMPATIBLE: 10,
        Reason.MODEL_INCOMPATIBLE: 11,
        Reason.MODEL_ACCESS_DENIED: 12,
        Reason.MODEL_NOT_FOUND: 13,
        Reason.DATASET_SCHEMA_INVALID: 20,
        Reason.DATA_ROWS_REJECTED: 21,
        Reason.NOTHING_TO_LEARN: 22,
        Reason.DATASET_NOT_FOUND: 23,
        Reason.REWARD_ERROR: 30,
        Reason.ROLLOUT_ERROR: 31,
        Reason.NON_FINITE: 40,
        Reason.GUARD_TRIPPED: 41,
        Reason.CHECKPOINT_INCOMPATIBLE: 50,
        Reason.STORAGE_FULL: 51,
        Reason.STORAGE_READ_ONLY: 52,
        Reason.ACCELERATOR_OUT_OF_MEMORY: 60,
    }
    # Above 127: below, the training-operator would fail the job before ours can suspend it.
    suspended[Reason.GUARD_SUSPENDED] = ReasonInfo(Effect.SUSPENDED, 163)
    told = (
        Reason.GRACE_PERIOD_TOO_SHORT,
        Reason.CHECKPOINT_REFUSED,
        Reason.GUARD_WARNED,
        Reason.SAMPLER_MISMATCH,
        Reason.NO_PROGRESS,
    )
    warnings = dict.fromkeys(told, ReasonInfo(Effect.WARNING))
    permanent_infos = {reason: ReasonInfo(Effect.FAILED, code) for reason, code in permanent.items()}
    return {**suspended, **stalled, **failed, **permanent_infos, **_RETRYABLE, **warnings}


REASONS: dict[Reason, ReasonInfo] = _table()
_BY_CODE = {info.exit_code: reason for reason, info in REASONS.items() if info.exit_code is not None}


def exit_code_of(reason: Reason) -> int:
    """The code the trainer's launcher ends with for this reason. ValueError where the trainer cannot say it."""
    code = REASONS[reason].exit_code
    if code is None:
        raise ValueError(f"{reason} has no exit code: it is not the trainer's to report")
    return code


def reason_of_exit_code(code: int) -> Reason:
    """Reads a container's exit code (1–255) where no termination message tells more.

    An unknown code below 128 is InternalError (permanent); 134, 137 and 139 without an OOM mark are a killed process;
    any other code from 128 on is ProcessKilled, because nothing of ours ends with it.
    """
    if code in (134, 137, 139):
        return Reason.PROCESS_KILLED
    known = _BY_CODE.get(code)
    if known is not None:
        return known
    return Reason.INTERNAL_ERROR if code < 128 else Reason.PROCESS_KILLED
