"""How the other nodes learn from storage what node 0 has prepared, or why it could not.

Node 0 leaves two files beside the manifest: a pulse while it prepares, and its failure. A node that sees neither
manifest nor a moving
pulse for long enough ends: its volume is not node 0's, or node 0 never came.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from posttrain_api.base import Model
from posttrain_api.names import PREPARED_DIR
from posttrain_api.reasons import REASONS, Effect, Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.prepared import Prepared, read_manifest
from posttrain_trainer.record import utc_now
from posttrain_trainer.supervise import Supervisor

ENV_WAIT_SECONDS = "POSTTRAIN_WAIT_SECONDS"
"""How long node 0 may give no sign of life."""
WAIT_SECONDS = 1800.0
POLL_SECONDS = 0.5
PULSE = "pulse"
FAILURE = "failure.json"


class PrepareFailure(Model):
    """Node 0's word to the others that there will be no manifest in this attempt."""

    reason: Reason
    message: str
    config_digest: str
    time: str


def matching_manifest(config: TrainerConfig, digest: str) -> Prepared | None:
    """The manifest of exactly this config; None where there is none, or one of another config or release."""
    try:
        prepared = read_manifest(Path(config.run_dir) / PREPARED_DIR)
    except ValueError:
        return None
    return prepared if prepared is not None and prepared.config_digest == digest else None


def beat(folder: Path) -> None:
    """Node 0, while it prepares: moves the pulse."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PULSE).write_text(utc_now())


def announce(folder: Path, failure: PrepareFailure) -> None:
    """Node 0: there will be no manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / (FAILURE + ".tmp")
    temporary.write_text(failure.to_json())
    temporary.replace(folder / FAILURE)


def withdraw(folder: Path) -> None:
    """Node 0, at its start: what an earlier attempt announced no longer holds."""
    (folder / FAILURE).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Signs:
    """What of node 0 is to be seen on storage."""

    pulse: str | None
    failure: PrepareFailure | None

    @classmethod
    def of(cls, folder: Path) -> _Signs:
        return cls(_text(folder / PULSE), _failure(folder))


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:  # not there yet, or storage that is just coming up: both mean no sign
        return None


def _failure(folder: Path) -> PrepareFailure | None:
    text = _text(folder / FAILURE)
    try:
        return PrepareFailure.model_validate_json(text) if text else None
    except ValidationError:
        return None


def wait_for_manifest(config: TrainerConfig, supervisor: Supervisor, environment: Mapping[str, str]) -> Prepared | None:
    """The manifest when it is there; None when told to stop.

    TrainerFailure where node 0 announced a failure (PeerLost: the cause is in node 0's own message, unless it is
    permanent), or gave no sign for POSTTRAIN_WAIT_SECONDS (PeerLost, with the question of ReadWriteMany).
    """
    folder = Path(config.run_dir) / PREPARED_DIR
    digest = config.digest()
    patience = float(environment.get(ENV_WAIT_SECONDS, str(WAIT_SECONDS)))
    first = _Signs.of(folder)
    last, deadline = first, time.monotonic() + patience
    while (prepared := matching_manifest(config, digest)) is None:
        now = _Signs.of(folder)
        if now.failure is not None and _counts(now.failure, first, digest):
            raise _failed_there(now.failure)
        if now != last:
            last, deadline = now, time.monotonic() + patience
        if time.monotonic() > deadline:
            raise _no_sign(folder, patience)
        if not supervisor.sleep(POLL_SECONDS):
            return None
    return prepared


def _counts(failure: PrepareFailure, first: _Signs, digest: str) -> bool:
    """One that was there before us may be an earlier attempt's; a permanent one of this very config holds even then."""
    return failure != first.failure or (_is_permanent(failure.reason) and failure.config_digest == digest)


def _is_permanent(reason: Reason) -> bool:
    return REASONS[reason].effect is Effect.FAILED


def _failed_there(failure: PrepareFailure) -> TrainerFailure:
    reason = failure.reason if _is_permanent(failure.reason) else Reason.PEER_LOST
    return TrainerFailure(reason, f"Node 0 could not prepare: {failure.reason}: {failure.message}")


def _no_sign(folder: Path, patience: float) -> TrainerFailure:
    return TrainerFailure(
        Reason.PEER_LOST,
        f"{folder}: no manifest and no sign of node 0 for {patience:.0f} s. If the master's pod runs, "
        f"this pod's volume is "
        "not the same: the claim of a job with several nodes needs access mode ReadWriteMany.",
    )
