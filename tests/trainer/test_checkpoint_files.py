"""Folders of checkpoints: committed or not, whole or not, the order in which they go."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from storage_jobs import Weights, checkpoints, content, save

from posttrain_api.records import Best
from posttrain_trainer import checkpoint_files as files
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.fence import Fence, current_attempt
from posttrain_trainer.runtime import Control


def _write(root: Path, step: int, attempt: int = 1, text: str = "state") -> Path:
    temporary = files.temporary_of(root, step, attempt)
    (temporary / "ds").mkdir(parents=True)
    (temporary / "ds" / "weights.pt").write_text(text)
    (temporary / "trainer.json").write_text("{}")
    listed = files.entries(temporary, files.files_below(temporary))
    final = files.folder_of(root, step)
    files.commit(
        temporary, final, files.Manifest(step=step, time="2026-01-01T00:00:00Z", attempt=attempt, files=listed)
    )
    return final


def _steps(root: Path) -> list[int]:
    return [entry.manifest.step for entry in files.committed(root)]


def test_a_record_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renamed first, it could be empty after a loss of power; and the new name must reach the disk too."""
    record, synced = tmp_path / "record.json", list[tuple[str, str]]()
    fsync = os.fsync

    def note(descriptor: int) -> None:
        fsync(descriptor)
        now = record.read_text() if record.exists() else "nothing"
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, now))

    monkeypatch.setattr(os, "fsync", note)
    files.replace_json(record, {"a": 1})
    files.replace_json(record, {"a": 2})
    first, second = ('{\n "a": 1\n}', '{\n "a": 2\n}')
    temporary, folder = "record.json.tmp", tmp_path.name
    assert synced == [(temporary, "nothing"), (folder, first), (temporary, first), (folder, second)]
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("staged", [False, True])
def test_a_checkpoint_is_on_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staged: bool
) -> None:
    """Its files and the folders that name them; then the name of the whole."""
    synced, renamed, fsync, rename = list[str](), list[int](), os.fsync, Path.rename

    def note(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path / "checkpoints"))

    def name(path: Path, target: Path) -> Path:
        renamed.append(len(synced))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", name)
    assert save(checkpoints(tmp_path, staging=tmp_path / "node" if staged else None), 2) is None
    [before] = renamed
    folder = Path("step-000002.tmp-1")
    parts = ("trainer.json", "rank-00000.pt", "ds/model.pt", "ds/optimizer.pt", "manifest.json", "ds", ".")
    assert {str(folder / part) for part in parts} <= set(synced[:before])
    assert synced[before] == "."


def test_what_one_node_sees_late_is_in_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank sees it already: its share and ours are of the same list."""
    below, gather, folder = files.files_below, Control.gather, tmp_path / "checkpoints" / "step-000002.tmp-1"

    def others_too(control: Control, mine: Any) -> list[Any]:
        return [mine, below(folder)] if mine == [] else gather(control, mine)

    monkeypatch.setattr(files, "files_below", lambda _: [])
    monkeypatch.setattr(Control, "gather", others_too)
    assert save(checkpoints(tmp_path), 2) is None
    [entry] = files.committed(tmp_path / "checkpoints")
    assert sorted(entry.manifest.files) == ["ds/model.pt", "ds/optimizer.pt", "rank-00000.pt", "trainer.json"]


def test_newest_first_and_only_the_committed(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        _write(tmp_path, step)
    (tmp_path / "step-000012").mkdir()
    (tmp_path / "step-000012" / "trainer.json").write_text("{}")
    files.temporary_of(tmp_path, 14, 1).mkdir()
    assert _steps(tmp_path) == [10, 4, 2]
    files.remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000{n}" for n in ("02", "04", "10")]


def test_a_manifest_cut_by_a_crash_is_no_commit(tmp_path: Path) -> None:
    folder = _write(tmp_path, 3)
    text = (folder / files.MANIFEST).read_text()
    (folder / files.MANIFEST).write_text(text[: len(text) // 2])
    assert _steps(tmp_path) == []


def test_what_cannot_be_read_now_is_not_lost(tmp_path: Path) -> None:
    """The storage does not give a manifest: an older checkpoint is better than none, and it is said why; without one
    the storage's error is told, which may pass, and nobody is sent to restore files that are whole."""
    store = checkpoints(tmp_path)
    assert (save(store, 2), save(store, 4)) == (None, None)
    for step in (4, 2):
        manifest = tmp_path / "checkpoints" / f"step-{step:06d}" / files.MANIFEST
        manifest.unlink()
        manifest.mkdir()  # an error of reading that even root meets
        again = checkpoints(tmp_path, attempt=2)
        if step == 4:
            assert again.resume(Weights()).step == 2
            assert again.last is not None
            assert again.last.refused == f"{manifest.parent}: its manifest.json cannot be read: Is a directory"
    for _ in range(2):
        with pytest.raises(IsADirectoryError):
            again.resume(Weights())
        (tmp_path / "committed.json").unlink(missing_ok=True)  # killed before it was written: no fresh start either


def test_a_best_that_cannot_be_read_now_is_neither_lost_nor_in_the_way(tmp_path: Path) -> None:
    """The newest is resumed, the best is spared; who exports it is told the storage's error, which may pass."""
    best = Best(step=2, metric="eval_loss", value=1.0, uri="pvc://runs/job/u1/best")
    store, folder = checkpoints(tmp_path, keep=1), tmp_path / "checkpoints" / "step-000002"
    store.save(content(2, best=best))
    store.save(content(4, best=best))
    text = (folder / files.MANIFEST).read_text()
    (folder / files.MANIFEST).unlink()
    (folder / files.MANIFEST).mkdir()
    again = checkpoints(tmp_path, keep=1, attempt=2)
    state = again.resume(Weights())
    assert (state.step, state.best) == (4, best)
    with pytest.raises(IsADirectoryError):
        again.load(Weights(), 2)
    (folder / files.MANIFEST).rmdir()
    (folder / files.MANIFEST).write_text(text)
    again.save(content(6, best=state.best))
    assert _steps(tmp_path / "checkpoints") == [6, 2]


def test_who_finds_none_reads_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that is away for a moment, as a soft mount is."""
    store = checkpoints(tmp_path)
    assert (save(store, 2), save(store, 4)) == (None, None)
    read, left = Path.read_bytes, [OSError(errno.ESTALE, "Stale file handle") for _ in range(2)]

    def stale(path: Path) -> bytes:
        if path.name == files.MANIFEST and left:
            raise left.pop()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", stale)
    assert checkpoints(tmp_path, attempt=2).resume(Weights()).step == 4


def test_nothing_goes_where_the_storage_does_not_say_that_it_is_unfinished(tmp_path: Path) -> None:
    folder = _write(tmp_path, 3)
    (folder / files.MANIFEST).unlink()
    (folder / files.MANIFEST).symlink_to(files.MANIFEST)  # an error of looking that even root meets
    files.remove_unfinished(tmp_path)
    assert folder.exists()


def test_damage_is_named(tmp_path: Path) -> None:
    folder = _write(tmp_path, 3)
    entry = files.committed(tmp_path)[0]
    assert files.damaged(entry, entry.manifest.files) is None
    (folder / "ds" / "weights.pt").write_text("stale")
    problem = files.damaged(entry, entry.manifest.files)
    assert problem is not None
    assert "weights.pt: sha256:" in problem
    (folder / "ds" / "weights.pt").write_text("longer than before")
    assert "18 bytes, the manifest says 5 bytes" in (files.damaged(entry, entry.manifest.files) or "")
    (folder / "ds" / "weights.pt").unlink()
    assert "weights.pt: missing" in (files.damaged(entry, entry.manifest.files) or "")


def test_prune_goes_by_the_order_of_commits(tmp_path: Path) -> None:
    """Attempt 2 began anew (resume Never): attempt 1's later steps are the older ones."""
    _write(tmp_path, 500, attempt=1)
    _write(tmp_path, 10, attempt=2)
    _write(tmp_path, 20, attempt=2)
    assert files.prune(tmp_path, keep=2) == [tmp_path / "step-000500"]
    assert _steps(tmp_path) == [20, 10]
    assert files.prune(tmp_path, keep=2) == []


def test_a_step_is_replaced(tmp_path: Path) -> None:
    _write(tmp_path, 3, attempt=1, text="old")
    folder = _write(tmp_path, 3, attempt=2, text="new")
    assert (folder / "ds" / "weights.pt").read_text() == "new"
    assert [entry.manifest.attempt for entry in files.committed(tmp_path)] == [2]


def test_fence(tmp_path: Path) -> None:
    assert current_attempt(tmp_path) is None
    Fence(tmp_path, 1).check()
    (tmp_path / "attempt.json").write_text('{"attempt": 2}')
    Fence(tmp_path, 2).check()
    with pytest.raises(TrainerFailure, match="attempt 2 has taken over, this is attempt 1"):
        Fence(tmp_path, 1).check()


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        _write(tmp_path, step)
    assert [path.name for path in files.prune(tmp_path, 2, {2})] == ["step-000004"]
    assert _steps(tmp_path) == [8, 6, 2]
    files.prune(tmp_path, 2, {8})  # a newer one is the best: the former goes, and no third is kept
    assert _steps(tmp_path) == [8, 6]


@pytest.mark.parametrize("done", [0, 1, 2])
def test_replacing_a_checkpoint_never_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int) -> None:
    """The same step is saved twice where its evaluation was missing; killed before, between and after the two renames
    there is a whole one, and nothing else."""
    _write(tmp_path, 3, text="first")
    rename, calls = Path.rename, [0]

    def rename_or_die(path: Path, target: Path) -> Path:
        if calls[0] == done:
            raise KeyboardInterrupt
        calls[0] += 1
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_die)
    if done == 2:
        monkeypatch.setattr(files.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path, 3, attempt=2, text="second")
    monkeypatch.undo()
    files.bring_back(tmp_path)
    files.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
    entry = files.committed(tmp_path)[0]
    assert files.damaged(entry, entry.manifest.files) is None
    assert (entry.folder / "ds" / "weights.pt").read_text() == ("second" if done == 2 else "first")
