"""Failures by name: what the trainer knows by type, and how any other exception is read.

Everything in the trainer that knows why it cannot go on raises `TrainerFailure` with a reason of the contract and a
message that gives the path, the rule, the value found and the next step. `classify` reads all other exceptions, once,
at the top of a process. It goes by type names and system error numbers, so that the launcher need not import torch.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posttrain_api.reasons import Reason

MAX_MESSAGE = 1000

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FULL_TEXT = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",
)
"""What libraries that swallow the error number (torch.save, safetensors, pyarrow) say."""
_READ_ONLY_TEXT = "Read-only file system"
_PEER_TYPES = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError"})
_PEER_TEXT = (
    "Connection reset by peer",
    "Connection closed by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "gloo/transport",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)


class TrainerFailure(Exception):
    """A failure whose reason is known. `message` is shown to the user as it is."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = printable(message)


class AgreedFailure(TrainerFailure):
    """Raised by all ranks together, at the same place: before they end they may still do something in common."""


class NotFinite(AgreedFailure):
    """A metric is NaN or infinite; raised before the step is applied."""

    def __init__(self, metric: str, place: str = "") -> None:
        super().__init__(
            Reason.NON_FINITE,
            f"{metric} is not finite{place}. The step was not applied and the checkpoints before it are kept. Lower "
            "training.learningRate, raise training.warmupSteps, or look at the rows of this step.",
        )
        self.metric = metric

    def at(self, step: int, detail: str) -> NotFinite:
        """With the step and what is known of it."""
        return NotFinite(self.metric, f" at step {step} ({detail})")


def classify(error: BaseException) -> tuple[Reason, str]:
    """Reason and message of any exception; the causes behind it are looked at too, the outermost known one decides."""
    for cause in _chain(error):
        if isinstance(cause, TrainerFailure):
            return cause.reason, cause.message[:MAX_MESSAGE]
        reason = _by_type(cause)
        if reason is not None:
            return reason, _message(reason, cause)
    return Reason.TRAINER_ERROR, describe(error)


def describe(error: BaseException) -> str:
    """`Type: text`, bounded."""
    return printable(f"{type(error).__name__}: {error}")[:MAX_MESSAGE]


@contextmanager
def readable(reason: Reason, where: str, path: Path | None = None) -> Iterator[None]:
    """Inside it a file that this process may not read is a TrainerFailure with `reason`, also where something else
    was made of it: another attempt would be refused too. `where`: the source as the user named it; `path`: of a library
    that does not tell the file."""
    try:
        yield
    except Exception as error:
        denied = next((cause for cause in _chain(error) if isinstance(cause, PermissionError)), None)
        if denied is None:
            raise
        name = denied.filename or path
        raise TrainerFailure(
            reason,
            f"{where}: permission denied{f' for {name}' if name else ''}; this process has uid {os.geteuid()} and "
            f"groups {_groups()}. Let one of them read the files and enter their folders (chmod -R a+rX), then run the "
            "job anew.",
        ) from error


def _groups() -> str:
    return ", ".join(str(group) for group in sorted({os.getegid(), *os.getgroups()}))


def printable(text: str) -> str:
    r"""With `\udcff` spelled out where it is no Unicode: a file's name or a JSON string may have halves of surrogate
    pairs, and no log, record or termination message takes them."""
    return text.encode(errors="backslashreplace").decode()


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _by_type(error: BaseException) -> Reason | None:
    text = str(error)
    if (isinstance(error, OSError) and error.errno == errno.EROFS) or _READ_ONLY_TEXT in text:
        return Reason.STORAGE_READ_ONLY
    if (isinstance(error, OSError) and error.errno in _FULL) or any(part in text for part in _FULL_TEXT):
        return Reason.STORAGE_FULL
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OutOfMemoryError" in names:
        return Reason.ACCELERATOR_OUT_OF_MEMORY
    # Only torch's own errors: a reset connection to a hub or a status server loses no peer.
    if names & _PEER_TYPES or (isinstance(error, RuntimeError) and any(part in text for part in _PEER_TEXT)):
        return Reason.PEER_LOST
    return None


def _message(reason: Reason, error: BaseException) -> str:
    if reason is Reason.STORAGE_FULL:
        advice = "the storage is full. Enlarge or empty the claim or lower checkpoint.keepLast, then run it anew."
        return f"{_where(error)}{advice} {describe(error)}"[:MAX_MESSAGE]
    if reason is Reason.STORAGE_READ_ONLY:
        advice = "the volume is mounted read-only. Have it repaired or mounted to be written, then run the job anew."
        return f"{_where(error)}{advice} {describe(error)}"[:MAX_MESSAGE]
    if reason is Reason.ACCELERATOR_OUT_OF_MEMORY:
        advice = "lower training.tokensPerMicroBatch or data.maxLength, or raise deepspeed.zeroStage."
        return f"The accelerator's memory was not enough: {advice} {describe(error)}"[:MAX_MESSAGE]
    return f"The connection to another rank broke. {describe(error)}"[:MAX_MESSAGE]


def _where(error: BaseException) -> str:
    where = getattr(error, "filename", None)
    return printable(f"{where}: ") if where else ""
