"""What counts as getting on in a rank, and how nodes tell each other; the patience of groups."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from posttrain_api.names import ENV_STALL_SECONDS
from posttrain_trainer import signs
from posttrain_trainer.checkpoint_files import file_digest
from posttrain_trainer.peers import Advances
from posttrain_trainer.progress import Progress
from posttrain_trainer.runtime import CONTROL_TIMEOUT, GROUP_TIMEOUT, Control, patience


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The signs of rank 0, whose loop has begun."""
    made = tmp_path / "signs"
    made.mkdir()
    monkeypatch.setenv(signs.ENV_SIGNS, str(made))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(signs._Process, "watched", True)
    return made


def agree(where: Path) -> None:
    Control(None, 1).any(False)


def hash_a_file(where: Path) -> None:
    (where / "model").write_bytes(b"x")
    file_digest(where / "model")


def count(where: Path) -> None:
    with Progress("tokenise", 10) as progress:
        progress.advance(1, "1 row")


@pytest.mark.parametrize("act", [agree, hash_a_file, count])
def test_getting_on_leaves_a_mark(folder: Path, tmp_path: Path, act: object) -> None:
    act(tmp_path)  # type: ignore[operator]
    assert list(signs.marks(folder)) == ["mark-0"]


def test_nodes_tell_each_other_and_never_themselves_for_ever(tmp_path: Path) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folders = [tmp_path / "a", tmp_path / "b"]
    for each in folders:
        each.mkdir()
    here, there = (Advances(each) for each in folders)
    for _ in range(2):
        here.share(store)
        there.share(store)
    assert signs.marks(folders[0]) == signs.marks(folders[1]) == {}  # nobody has begun
    signs.touch(folders[0], "0")
    here.share(store)
    there.share(store)
    assert list(signs.marks(folders[1])) == ["mark-others"]
    before = [signs.marks(each) for each in folders]
    for _ in range(3):
        here.share(store)
        there.share(store)
    assert [signs.marks(each) for each in folders] == before


def test_a_group_waits_longer_than_a_hang_takes_to_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV_STALL_SECONDS, raising=False)
    assert patience(GROUP_TIMEOUT) == timedelta(minutes=45)
    assert patience(CONTROL_TIMEOUT) == timedelta(hours=2)
    monkeypatch.setenv(ENV_STALL_SECONDS, "60")
    assert patience(GROUP_TIMEOUT) == timedelta(minutes=30)
    monkeypatch.setenv(ENV_STALL_SECONDS, "7200")
    assert patience(CONTROL_TIMEOUT) == timedelta(hours=2, minutes=15)
