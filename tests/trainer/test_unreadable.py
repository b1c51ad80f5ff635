"""A data or model file that the pod's user may not read: a permanent failure that names the file, the user and the next
step. The file system is asked as another user, because root may read everything."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_kit import model_folder, model_source, texts, write_jsonl

from posttrain_api.reasons import Reason
from posttrain_trainer.data.readers import list_files, read
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.fetch import Fetcher
from posttrain_trainer.model_start import given_model

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """Every user may enter it and what is above it; pytest's own folders are private."""
    path = Path(tempfile.mkdtemp(dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def _as_nobody() -> Iterator[None]:
    libc = ctypes.CDLL(None)
    before = libc.setfsuid(NOBODY)
    try:
        yield
    finally:
        libc.setfsuid(before)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_data_file(folder: Path, name: str) -> None:
    path = folder / name
    if name.endswith("jsonl"):
        write_jsonl(path, texts(3))
    else:
        pq.write_table(pa.table({"text": ["one", "two"]}), path)
    path.chmod(0)
    with _as_nobody(), pytest.raises(TrainerFailure) as refused:
        list(read(list_files(path, "pvc://data/a")[0]))
    assert refused.value.reason is Reason.DATASET_NOT_FOUND
    assert f"permission denied for {path}; this process has uid {os.geteuid()}" in refused.value.message
    assert "chmod -R a+rX" in refused.value.message


def test_a_folder_that_may_not_be_entered(folder: Path) -> None:
    """Not taken for an empty one."""
    inner = folder / "inner"
    inner.mkdir()
    write_jsonl(inner / "a.jsonl", texts(3))
    inner.chmod(0)  # an ordinary user stays who they are, and may enter what is their own
    with _as_nobody(), pytest.raises(PermissionError):
        list_files(folder, "pvc://data/a")
    inner.chmod(0o755)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_file(folder: Path, name: str) -> None:
    model_folder(folder / "model")
    (folder / "model" / name).chmod(0)
    given = model_source(folder / "model")
    with _as_nobody(), pytest.raises(TrainerFailure) as refused:
        given_model(given, Fetcher(folder / "hub"))
    assert refused.value.reason is Reason.MODEL_ACCESS_DENIED
    assert str(folder / "model") in refused.value.message
