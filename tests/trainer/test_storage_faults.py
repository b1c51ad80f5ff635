"""A storage that fills up, becomes read-only, loses or tears what it has: the older checkpoint stays and is used, and
the reason is right. ENOSPC comes at every point of a save that there is: the file system is given one page more each
time.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import storage_jobs
from storage_jobs import PAGE, Weights, checkpoints, found, save
from trainer_kit import run_ranks

from posttrain_trainer.errors import TrainerFailure

ONE = 24
"""Pages that one checkpoint needs at most, folders and records counted; a tmpfs counts in pages."""


def _told(tmp_path: Path, job: str, *arguments: Any) -> dict[str, Any]:
    result = tmp_path / "told.json"
    run_ranks(getattr(storage_jobs, job), (str(tmp_path / "storage"), *arguments, str(result)), 1, tmp_path / "logs")
    told: dict[str, Any] = json.loads(result.read_text())
    if told["skipped"]:
        pytest.skip(told["skipped"])
    return told


@pytest.fixture(params=["straight", "staged"])
def staging(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """The node's folder, from which a save is copied; None where it goes straight to the storage."""
    return str(tmp_path / "node") if request.param == "staged" else None


@pytest.mark.parametrize(("what", "most"), [("pages", ONE + 12), ("inodes", 16)])
def test_full_at_any_point_of_a_save(tmp_path: Path, what: str, most: int, staging: str | None) -> None:
    trials = _told(tmp_path, "every_size", staging, what, most)["trials"]
    assert {trial["first"] for trial in trials} == {None}
    assert {trial["reason"] for trial in trials} == {None, "StorageFull"}  # some sizes are too small, some are not
    for trial in trials:
        assert 2 in trial["whole"], trial
        assert trial["committed"] == trial["whole"], trial
        assert trial["other"] == [], trial
        assert trial["reason"] is not None or trial["whole"] == [4, 2], trial
        assert trial["resumed"] == trial["whole"][0], trial
        assert trial["from"] == f"step-{trial['resumed']:06d}", trial


def test_a_storage_that_becomes_read_only(tmp_path: Path) -> None:
    told = _told(tmp_path, "read_only")
    assert told["first"] is None
    reason, message = told["refused"]
    assert reason == "StorageReadOnly"
    assert message.startswith("pvc://runs/job/u1: the checkpoint could not be written, the volume is mounted read-only")
    assert told["committed"] == told["whole"] == [2]


def test_the_node_is_not_taken_for_the_claim(tmp_path: Path) -> None:
    told = _told(tmp_path, "small_node", ONE)
    assert told["first"] is None
    for case, reason in (("full", "StorageFull"), ("fixed", "StorageReadOnly")):
        assert told[case][0] == reason
        assert told[case][1].startswith("checkpoint.staging: ")
        assert "leave staging out" in told[case][1]
    assert told["committed"] == told["whole"] == [2]
    assert (told["other"], told["left"]) == ([], ["filler"])
    assert (told["can"], told["third"], told["now"]) == (False, None, [6, 2])


def test_room_is_made_before_a_save_where_the_newest_is_whole(tmp_path: Path, staging: str | None) -> None:
    told = _told(tmp_path, "room", staging, 3 * ONE * PAGE)
    assert set(told["reasons"]) == {None}
    assert told["healthy"]["whole"] == [6, 5, 4] or told["healthy"]["whole"] == [6, 5]
    assert told["damaged"] == "StorageFull"
    assert told["left"]["committed"] == told["healthy"]["committed"]
    assert told["left"]["whole"] == told["healthy"]["whole"][1:]


def _tear(folder: Path, how: str) -> None:
    path = folder / "ds" / "model.pt"
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_torn_one_is_refused_by_name_and_the_older_one_is_used(tmp_path: Path, how: str) -> None:
    store = checkpoints(tmp_path)
    for step in (2, 4, 6):
        assert save(store, step) is None
    for step in (4, 6):
        _tear(tmp_path / "checkpoints" / f"step-{step:06d}", how)
    weights, again = Weights(), checkpoints(tmp_path, attempt=2)
    assert again.resume(weights).step == 2
    assert [folder.name for folder in weights.loaded] == ["step-000002"]
    assert again.last is not None
    assert again.last.step == 2
    assert "step-000006/ds/model.pt: " in (again.last.refused or "")
    assert "step-000004/ds/model.pt: " in (again.last.refused or "")
    assert found(tmp_path)["committed"] == [6, 4, 2]  # nothing is removed: somebody may restore it


def test_a_whole_one_refuses_nothing(tmp_path: Path) -> None:
    assert save(checkpoints(tmp_path), 2) is None
    again = checkpoints(tmp_path, attempt=2)
    assert again.resume(Weights()).step == 2
    assert again.last is not None
    assert again.last.refused is None


def test_the_newest_has_lost_its_manifest(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    assert (save(store, 2), save(store, 4)) == (None, None)
    (tmp_path / "checkpoints" / "step-000004" / "manifest.json").unlink()
    again = checkpoints(tmp_path, attempt=2)
    assert again.resume(Weights()).step == 2
    assert again.last is not None
    assert "step-000004: its manifest.json is lost" in (again.last.refused or "")


@pytest.mark.parametrize("lost", ["folders", "manifests"])
def test_lost_checkpoints_are_no_fresh_start(tmp_path: Path, lost: str) -> None:
    store = checkpoints(tmp_path)
    assert (save(store, 2), save(store, 4)) == (None, None)
    if lost == "folders":
        shutil.rmtree(tmp_path / "checkpoints")
    else:
        for path in (tmp_path / "checkpoints").glob("*/manifest.json"):
            path.unlink()
    with pytest.raises(TrainerFailure, match="step 4 was committed there, and no checkpoint is left") as caught:
        checkpoints(tmp_path, attempt=2).resume(Weights())
    assert caught.value.reason == "CheckpointIncompatible"
    kept = list((tmp_path / "checkpoints").glob("step-*/ds/model.pt"))
    assert len(kept) == (0 if lost == "folders" else 2)  # nothing is removed: the manifests may come back


def test_a_first_save_that_was_cut_off_is_a_fresh_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoints" / "step-000002.tmp-1").mkdir(parents=True)
    with caplog.at_level(logging.INFO):
        assert checkpoints(tmp_path, attempt=2).resume(Weights()).step == 0
    assert found(tmp_path) == {"committed": [], "whole": [], "other": []}
