"""Reasons by exception, and the end record that ranks leave for the launcher."""

import errno
import os
from pathlib import Path

import pytest
import torch

from posttrain_api.reasons import REASONS, Effect, Reason
from posttrain_api.records import (
    MAX_TERMINATION_BYTES,
    Checkpoint,
    Output,
    Success,
    parse_termination,
    render_termination,
)
from posttrain_trainer.errors import TrainerFailure, classify, readable
from posttrain_trainer.record import clear_ends, failed, preempted, read_ends, succeeded, write_end


def _wrapped(inner: BaseException) -> BaseException:
    try:
        try:
            raise inner
        except BaseException as error:
            raise RuntimeError("while saving") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TrainerFailure(Reason.NON_FINITE, "loss is NaN"), Reason.NON_FINITE),
        (OSError(errno.ENOSPC, "No space left on device", "/storage/x"), Reason.STORAGE_FULL),
        (OSError(errno.ENOSPC, "as another language says it"), Reason.STORAGE_FULL),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/storage/x"), Reason.STORAGE_FULL),
        (OSError(errno.EROFS, "Read-only file system", "/storage/x"), Reason.STORAGE_READ_ONLY),
        (RuntimeError("I/O error: Read-only file system (os error 30)"), Reason.STORAGE_READ_ONLY),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), Reason.STORAGE_FULL),
        (torch.OutOfMemoryError("CUDA out of memory"), Reason.ACCELERATOR_OUT_OF_MEMORY),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), Reason.PEER_LOST),
        (torch.distributed.DistBackendError("NCCL error"), Reason.PEER_LOST),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), Reason.TRAINER_ERROR),
        (ValueError("what"), Reason.TRAINER_ERROR),
    ],
)
def test_classify(error: BaseException, reason: Reason) -> None:
    assert classify(error)[0] is reason
    if reason is not Reason.TRAINER_ERROR:
        assert classify(_wrapped(error))[0] is reason


def test_storage_message_names_the_path() -> None:
    assert classify(OSError(errno.ENOSPC, "No space left on device", "/storage/x"))[1].startswith("/storage/x: ")


@pytest.mark.parametrize(
    "error",
    [
        TrainerFailure(Reason.DATASET_NOT_FOUND, "caf\udce9.jsonl: not there"),
        FileNotFoundError(errno.ENOENT, "No such file", "caf\udce9.jsonl"),
        OSError(errno.ENOSPC, "No space left on device", "caf\udce9.jsonl"),
    ],
)
def test_a_name_that_is_no_unicode_leaves_a_record_all_the_same(error: Exception, tmp_path: Path) -> None:
    write_end(tmp_path, failed(0, error))
    assert r"caf\udce9.jsonl" in read_ends(tmp_path, [0])[0].message


def test_ends_round_trip_and_first_word_holds(tmp_path: Path) -> None:
    write_end(tmp_path, failed(1, TrainerFailure(Reason.NON_FINITE, "NaN"), step=3))
    write_end(tmp_path, preempted(1, "saved", step=4))
    write_end(tmp_path, succeeded(0, step=5))
    ends = read_ends(tmp_path, range(3))
    assert {rank: (end.reason, end.step, end.exit_code) for rank, end in ends.items()} == {
        0: (None, 5, 0),
        1: (Reason.NON_FINITE, 3, 40),
    }
    clear_ends(tmp_path, [1])
    assert set(read_ends(tmp_path, range(3))) == {0}


def test_a_success_fits_whatever_its_uris_are_written_in() -> None:
    uri, time = "€" * 1024, "2026-01-01T00:00:00Z"
    saved = Checkpoint(step=1, time=time, uri=uri, size_bytes=1, digest="d")
    output = Output(uri=uri, digest="d", format="peft", size_bytes=1)
    text = render_termination(Success(output=output, step=1, metrics={"loss": 1.0}, checkpoint=saved))
    assert len(text.encode()) <= MAX_TERMINATION_BYTES
    assert parse_termination(text) == Success(output=output, step=1)


def test_a_file_that_may_not_be_read_is_a_permanent_failure() -> None:
    with pytest.raises(TrainerFailure) as refused, readable(Reason.DATASET_NOT_FOUND, "pvc://data/train.jsonl"):
        raise PermissionError(errno.EACCES, "Permission denied", "/claims/data/train.jsonl")
    reason, message = classify(refused.value)
    assert (reason, REASONS[reason].effect) == (Reason.DATASET_NOT_FOUND, Effect.FAILED)
    assert message.startswith(
        "pvc://data/train.jsonl: permission denied for /claims/data/train.jsonl; this process has "
    )
    assert f"uid {os.geteuid()} and groups {os.getegid()}" in message


def test_a_library_that_tells_no_file() -> None:
    told = readable(Reason.DATASET_NOT_FOUND, "a.parquet", Path("/claims/a.parquet"))
    with pytest.raises(TrainerFailure, match=r"permission denied for /claims/a\.parquet"), told:
        raise PermissionError("Failed to open local file")
    with pytest.raises(ValueError, match="another"), readable(Reason.DATASET_NOT_FOUND, "a.parquet"):
        raise ValueError("another error goes on")


def test_a_read_only_storage_is_not_said_to_be_full() -> None:
    reason, message = classify(OSError(errno.EROFS, "Read-only file system", "/storage/x"))
    assert reason is Reason.STORAGE_READ_ONLY
    assert message.startswith("/storage/x: the volume is mounted read-only. ")
    assert "empty" not in message
