"""checkpoint.staging: a save is copied to the storage while training goes on, counts only when it is there, and costs
nothing that a straight one would have kept. Real ranks; what the copy waits for is written in the test, not slept for.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import resume_jobs
import staging_jobs
from online_kit import online_job
from staging_jobs import WAITED
from storage_jobs import Weights, checkpoints, content, found, save
from trainer_kit import exported, make_config, make_model, prepare, rows, start_ranks, steady_lines, succeed

from posttrain_api.reasons import Reason
from posttrain_api.records import Best
from posttrain_trainer import checkpoint_copy, signs
from posttrain_trainer.checkpoint_copy import Copy
from posttrain_trainer.checkpoint_files import FileEntry, committed, damaged, file_digest, good_step
from posttrain_trainer.checkpoint_write import Room, all_fit
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.runtime import Control

STEPS = 8
RARE = {"checkpoint__every_steps": 4}
RATE = {"metric": "learning_rate", "above": 0.035, "for_steps": 2}
RISING = {"training__learning_rate": 0.09, "training__warmup_steps": 8, "training__schedule": "Linear"}
"""0.01 more each step: RATE is broken from step 4 on."""
THROWN = {"training__learning_rate": 1e30, "training__warmup_steps": 0}
"""The first step throws the weights so far that the second cannot be computed."""


def _job(run_dir: Path, ranks: int = 2, zero: int = 2, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "zero_stage": zero,
        "checkpoint__every_steps": 2,
        "checkpoint__keep_last": 2,
        "checkpoint__staging": "Disk",
        "topology__processes_per_node": ranks,
        "training__max_steps": STEPS,
    }
    config = make_config(run_dir, **{**given, **changes})
    if not (run_dir / "model").exists():
        make_model(run_dir / "model")
    prepare(config, rows(25))
    return config


def _run(config: Any, *job: Any, attempt: int = 1) -> tuple[list[int | None], list[str]]:
    """Exit codes and events."""
    run_dir = Path(config.run_dir)
    given = {"POSTTRAIN_CONFIG": str(run_dir / "config.json"), "POSTTRAIN_ATTEMPT": str(attempt)}
    ranks = config.topology.processes_per_node
    running = start_ranks(staging_jobs.held, job, ranks, run_dir / f"logs-{attempt}", **given)
    codes = running.wait()
    return codes, staging_jobs.events_of(run_dir)


def _steps(config: Any) -> list[int]:
    """Those that are whole."""
    entries = committed(Path(config.run_dir) / "checkpoints")
    return [entry.manifest.step for entry in entries if damaged(entry, entry.manifest.files) is None]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Jobs that save straight to the storage, by their ZeRO stage."""
    jobs = {
        zero: _job(tmp_path_factory.mktemp("straight"), zero=zero, checkpoint__staging=None, **RARE) for zero in (2, 3)
    }
    for job in jobs.values():
        succeed(job, 2)
    return jobs


@pytest.mark.parametrize("zero", [2, 3])
def test_training_goes_on_beside_the_copy(tmp_path: Path, straight: dict[int, Any], zero: int) -> None:
    """The copy of step 4 ends after step 5 is done; nothing is different but the order."""
    config = _job(tmp_path, zero=zero, **RARE)
    codes, events = _run(config, 1, 4, 5)
    assert codes == [0, 0]
    assert events.index("step 5") < events.index("copied 4") < events.index("commit 4") < events.index("step 8")
    assert [event for event in events if event.startswith("commit")] == ["commit 4", "commit 8"]
    assert exported(config) == exported(straight[zero])
    assert steady_lines(config) == steady_lines(straight[zero])
    assert _files(config) == _files(straight[zero])
    assert [*(tmp_path / "work" / "staging").iterdir()] == []


def _files(config: Any) -> dict[int, dict[str, str]]:
    """Digests of what each checkpoint holds, but for what names times."""
    entries = committed(Path(config.run_dir) / "checkpoints")
    kept = {entry.manifest.step: entry.manifest.files for entry in entries}
    return {
        step: {name: each.sha256 for name, each in listed.items() if name != "trainer.json"}
        for step, listed in kept.items()
    }


def test_a_save_that_falls_due_waits_for_the_one_before(tmp_path: Path) -> None:
    config = _job(tmp_path)
    codes, events = _run(config, 1, 2, WAITED)
    assert codes == [0, 0]
    assert events.index("step 4") < events.index("commit 2") < events.index("step 5")
    log = (tmp_path / "logs-1" / "rank-1.log").read_text()
    assert "training waits: step 2 is still being copied to the storage" in log


def test_the_last_save_is_there_before_the_job_ends(tmp_path: Path) -> None:
    config = _job(tmp_path, checkpoint__every_steps=7)
    codes, events = _run(config, 0, 7, WAITED)
    assert codes == [0, 0]
    assert events[-4:] == ["step 8", "copied 7", "commit 7", "commit 8"]
    assert _steps(config) == [8, 7]


def test_killed_while_the_copy_goes_on_is_bit_equal(tmp_path: Path, straight: dict[int, Any]) -> None:
    """What was not copied to its end was never saved; what is left of it goes."""
    config = _job(tmp_path)
    codes, events = _run(config, 1, 4, WAITED, "killed_after_line", 5)
    assert codes[0] == -9
    assert events[-1] == "step 5"
    assert _steps(config) == [2]
    assert (tmp_path / "checkpoints" / "step-000004.tmp-1").is_dir()
    succeed(config, 2, attempt=2)
    assert "at step 2" in (tmp_path / "logs-2" / "rank-0.log").read_text()
    assert exported(config) == exported(straight[2])
    assert steady_lines(config) == steady_lines(straight[2])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000006", "step-000008"]


def test_told_to_end_both_are_saved(tmp_path: Path, straight: dict[int, Any]) -> None:
    config = _job(tmp_path)
    codes, events = _run(config, 1, 2, WAITED, "term_after_line", 3)
    assert codes == [143, 143]
    assert events[-4:] == ["step 3", "copied 2", "commit 2", "commit 3"]
    assert _steps(config) == [3, 2]
    succeed(config, 2, attempt=2)
    assert exported(config) == exported(straight[2])
    assert steady_lines(config) == steady_lines(straight[2])


def test_told_to_end_in_the_step_after_nothing_is_saved_twice(tmp_path: Path) -> None:
    config = _job(tmp_path)
    codes, events = _run(config, 1, 2, WAITED, "term_in_copy")
    assert codes == [143, 143]
    assert events[-3:] == ["step 2", "copied 2", "commit 2"]
    assert _steps(config) == [2]


@pytest.mark.parametrize(("action", "code", "kept"), [("Fail", 41, [3]), ("Suspend", 163, [5, 3])])
def test_a_guard_keeps_what_is_on_its_way(tmp_path: Path, action: str, code: int, kept: list[int]) -> None:
    """It is the newest from before the first broken step. What others may start from is written before the landing:
    whoever does not live to its end has said it."""
    rules = {"guards": {"rules": [{**RATE, "action": action}]}}
    config = _job(tmp_path, checkpoint__every_steps=3, checkpoint__keep_last=1, **RISING, **rules)
    codes, events = _run(config, 0, 3, WAITED)
    assert codes == [code, code]
    assert _steps(config) == kept
    if action == "Fail":
        assert events[-3:] == ["good 3", "copied 3", "commit 3"]
    assert good_step(tmp_path / "checkpoints") == (3 if action == "Fail" else None)
    message = json.loads((tmp_path / "work" / "ends" / "rank-1.json").read_text())["message"]
    assert f"checkpoints/step-00000{kept[0]}" in message


def test_not_finite_keeps_what_is_on_its_way(tmp_path: Path) -> None:
    config = _job(tmp_path, zero=0, checkpoint__every_steps=1, **THROWN)
    codes, events = _run(config, 1, 1, WAITED)
    assert codes == [40, 40]
    assert events == ["step 1", "copied 1", "commit 1"]


def test_every_checkpoint_of_rl_is_staged_with_its_critic(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    both = {"topology__processes_per_node": 2, "training__max_steps": 3, "checkpoint__every_steps": 1}
    names = ("straight", "staged")
    for name, staging in zip(names, (None, "Memory"), strict=True):
        online_job(tmp_path / name, tmp_path / "model", "PPO", **both, checkpoint__staging=staging)
    configs = [make_config(tmp_path / name) for name in names]
    folders = [config.run_dir for config in configs]
    running = start_ranks(resume_jobs.attempt, (1, folders), 2, tmp_path / "logs")
    assert running.wait() == [0, 0], running.output()
    assert [(tmp_path / name / "work" / "staging").exists() for name in names] == [False, True]
    assert exported(configs[0]) == exported(configs[1])
    assert _files(configs[0]) == _files(configs[1])
    assert any("ds-critic" in name for name in _files(configs[1])[3])


@pytest.mark.parametrize(
    ("every", "good", "said"),
    [(2, 2, "is kept: pvc://runs/tiny/u1/checkpoints/step-000002 (step 2)"), (3, 3, "No checkpoint is from before")],
)
def test_a_guard_is_told_also_where_the_landing_fails(tmp_path: Path, every: int, good: int, said: str) -> None:
    """The storage is full for what is on its way, which is one from after the trouble began, or the good one itself.
    Others start from none after that step either way, as soon as there is room to say it."""
    config = _job(tmp_path, zero=0, checkpoint__every_steps=every, **RISING, guards={"rules": [RATE]})
    step = 4 if every == 2 else 3
    codes, events = _run(config, 1, step, WAITED, "full_in_copy", step)
    assert codes == [41, 41]
    assert f"commit {step}" not in events
    assert good_step(tmp_path / "checkpoints") == good
    for rank in (0, 1):
        assert said in json.loads((tmp_path / "work" / "ends" / f"rank-{rank}.json").read_text())["message"]
    assert "the checkpoint that was on its way is lost" in (tmp_path / "logs-1" / "rank-1.log").read_text()


def test_not_finite_is_told_also_where_the_landing_fails(tmp_path: Path) -> None:
    config = _job(tmp_path, zero=0, checkpoint__every_steps=1, **THROWN)
    codes, events = _run(config, 1, 1, WAITED, "full_in_copy", 1)
    assert codes == [40, 40]
    assert events == ["step 1", "copied 1"]
    assert "the checkpoint that was on its way is lost" in (tmp_path / "logs-1" / "rank-1.log").read_text()


def test_a_reward_that_fails_keeps_what_is_on_its_way(tmp_path: Path) -> None:
    """All ranks end together, so they land it first."""
    both = {"topology__processes_per_node": 2, "checkpoint__every_steps": 1, "checkpoint__staging": "Disk"}
    config = online_job(tmp_path, tmp_path / "model", **both)
    codes, events = _run(config, 1, 1, WAITED, "reward_fails", 1)
    assert codes == [30, 30]
    assert events == ["step 1", "copied 1", "commit 1"]


def test_where_a_node_has_no_room_all_ranks_save_straight(tmp_path: Path) -> None:
    """Room for one part and a half, on the node of two ranks: known once their size is."""
    config = _job(tmp_path)
    codes, events = _run(config, 1, 2, WAITED, "nearly_full_node", 1.5)
    assert codes == [0, 0]
    assert [event for event in events if event.startswith("copied")] == ["copied 2"]
    assert _steps(config) == [8, 6]
    log = (tmp_path / "logs-1" / "rank-0.log").read_text()
    assert log.count("this save goes straight to the storage") == 2  # of 4 and 6; the last one is anyway


@pytest.mark.parametrize("until", [WAITED, 5])
def test_a_copy_that_fails_on_one_rank(tmp_path: Path, until: int | str) -> None:
    """It is known when the copies are asked for, or when the next save must wait; nothing half written stays."""
    config = _job(tmp_path, checkpoint__every_steps=3)
    codes, events = _run(config, 1, 3, until, "full_in_copy", 3)
    assert codes[1] == 51
    assert codes[0] == 160  # PeerLost: not the cause
    assert "commit 3" not in events
    message = json.loads((tmp_path / "work" / "ends" / "rank-1.json").read_text())["message"]
    assert message.startswith("pvc://runs/tiny/u1: the checkpoint could not be written")
    assert [*(tmp_path / "checkpoints").iterdir()] == []


def test_a_storage_that_says_nothing_any_more_has_no_copy(tmp_path: Path) -> None:
    """Not even whether the folder is there: of a mount that is gone that question is an error too."""
    (tmp_path / "file").write_bytes(b"four")
    target = tmp_path / ("x" * 300)  # longer than a name may be
    with pytest.raises(OSError, match="File name too long"):
        target.stat()
    with pytest.raises(OSError, match="File name too long"):
        Copy(tmp_path, target, {"file": 4}).wait()


@pytest.mark.parametrize("sizes", [{"file": 5}, {"file": 4, "gone": 4}])
def test_what_is_not_what_was_staged_is_no_copy(tmp_path: Path, sizes: dict[str, int]) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "file").write_bytes(b"four")
    with pytest.raises(OSError, match="gone" if "gone" in sizes else "where {'file': 5} was to come"):
        Copy(source, target, sizes).wait()


@pytest.mark.parametrize("handed", [False, True])
def test_only_rank_0_removes_what_it_may_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handed: bool) -> None:
    """Another rank's copy fails here, or all is copied and the ranks lose each other."""

    def lost(*_: Any) -> Any:
        raise RuntimeError("Connection closed by peer")

    store = checkpoints(tmp_path, staging=tmp_path / "node", rank=1)
    folder = tmp_path / "checkpoints" / "step-000004.tmp-1"
    (folder / "ds").mkdir(parents=True)
    if not handed:
        monkeypatch.setattr(Copy, "_file", lost)
    store.stage(content(4))
    if handed:
        monkeypatch.setattr(Control, "gather", lost)
    with pytest.raises(RuntimeError, match="Connection closed"):
        store.land()
    assert folder.exists() == handed


def test_a_copy_makes_nothing_again_that_was_removed(tmp_path: Path) -> None:
    """By another rank whose copy has failed, or by the attempt after."""
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "ds").mkdir(parents=True)
    (source / "ds" / "model.pt").touch()
    with pytest.raises(TrainerFailure) as failed:
        Copy(source, target, {"ds/model.pt": 0}).wait()
    assert failed.value.reason is Reason.PEER_LOST  # a consequence, and told as one
    assert not target.exists()


@pytest.mark.parametrize(
    ("rooms", "fit"),
    [
        ([Room(0, 0, 0), Room(0, 0, 0)], True),  # the first: nobody knows
        ([Room(0, 205, 100), Room(0, 205, 100)], True),
        ([Room(0, 200, 100), Room(0, 200, 100)], False),  # enough for one, not for both
        ([Room(0, 150, 100), Room(1, 150, 100)], True),
        ([Room(0, 150, 100), Room(1, 50, 100)], False),
    ],
)
def test_the_ranks_of_a_node_share_its_room(rooms: list[Room], fit: bool) -> None:
    assert all_fit(rooms) == fit


def test_two_bests_and_no_moment_without_one(tmp_path: Path) -> None:
    """The best so far stays until the checkpoint of a better one is committed."""
    best = [Best(step=step, metric="eval_loss", value=1.0, uri=f"pvc://runs/{step}") for step in (2, 6)]
    store = checkpoints(tmp_path, keep=1, staging=tmp_path / "node")
    assert save(store, 2) is None
    store.stage(content(4, best=best[0]))
    store.land()  # by now 6 is better, and not saved
    assert found(tmp_path)["whole"] == [4, 2]
    store.stage(content(6, best=best[1]))
    store.land()
    assert found(tmp_path)["whole"] == [6]


def test_what_is_on_its_way_is_not_yet_good(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, staging=tmp_path / "node")
    store.stage(content(2))
    assert [store.without_landing(step) for step in (None, 2)] == [None, None]
    store.land()
    assert store.without_landing(2) == 2
    store.stage(content(4))
    assert [store.without_landing(step) for step in (None, 2, 4)] == [None, 2, 2]
    store.land()
    assert store.without_landing(4) == 4


def test_a_guards_word_goes_with_the_attempt_that_did_not_end_by_it(tmp_path: Path) -> None:
    """It was killed as it landed what was on its way; the next one may never break the rule."""
    store = checkpoints(tmp_path)
    assert save(store, 2) is None
    store.end_at(2)
    assert good_step(tmp_path / "checkpoints") == 2
    later = checkpoints(tmp_path, attempt=2)
    assert later.resume(Weights()).step == 2
    assert good_step(tmp_path / "checkpoints") == 2  # it may still fail to begin
    assert save(later, 4) is None
    assert good_step(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("act", ["end_at", "save"])
def test_an_overtaken_attempt_leaves_the_guards_word(tmp_path: Path, act: str) -> None:
    """It neither writes nor removes what the newer one has written."""
    old, newer = checkpoints(tmp_path), checkpoints(tmp_path, attempt=2)
    assert save(newer, 2) is None
    newer.end_at(2)
    (tmp_path / "attempt.json").write_text('{"attempt": 2}')
    before = found(tmp_path)
    with pytest.raises(TrainerFailure, match="attempt 2 has taken over"):
        old.end_at(4) if act == "end_at" else old.save(content(4))
    assert found(tmp_path) == before
    assert good_step(tmp_path / "checkpoints") == 2


def test_nothing_is_committed_once_a_newer_attempt_has_taken_over(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, staging=tmp_path / "node")
    store.stage(content(4))
    (tmp_path / "attempt.json").write_text('{"attempt": 2}')
    with pytest.raises(TrainerFailure, match="attempt 2 has taken over"):
        store.land()
    assert found(tmp_path)["committed"] == []


def test_save_seconds_end_with_the_copy(tmp_path: Path) -> None:
    """Not with the step after which it is committed, which may be long; `time` is that of the state."""
    store = checkpoints(tmp_path, staging=tmp_path / "node")
    store.stage(content(2))
    assert store._staged is not None
    taken, began = store._staged.taken, store._staged.began
    store._staged.copy._thread.join()
    store._staged.copy._ended = began + 7.25
    told = store.land().checkpoint
    assert (told.save_seconds, told.time) == (7.25, taken)


def test_a_copy_leaves_no_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that hangs must not look alive because its last checkpoint is being copied."""
    source, target, folder = (tmp_path / name for name in ("source", "target", "signs"))
    (source / "ds").mkdir(parents=True)
    target.mkdir()
    folder.mkdir()
    (source / "ds" / "model.pt").write_bytes(bytes(range(256)) * (1 << 16))
    monkeypatch.setenv(signs.ENV_SIGNS, str(folder))
    monkeypatch.setattr(signs._Process, "watched", True)
    copy = Copy(source, target, {"ds/model.pt": 1 << 24})
    copy._thread.join()
    assert signs.marks(folder) == {}
    entries, _ = copy.wait()
    copied = target / "ds" / "model.pt"
    assert copied.read_bytes() == (source / "ds" / "model.pt").read_bytes()
    assert entries == {"ds/model.pt": FileEntry(size=copied.stat().st_size, sha256=file_digest(copied))}
    assert list(signs.marks(folder)) == ["mark-prepare"]  # of file_digest just now: marks are seen here


@pytest.mark.parametrize("gets_on", [True, False])
def test_who_waits_for_a_copy_gets_on_as_the_copy_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gets_on: bool
) -> None:
    marks: list[int] = []

    def slow(copy: Copy, source: Path, target: Path) -> FileEntry:
        deadline = time.monotonic() + (30 if gets_on else 0.3)
        while len(marks) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
            copy._moved += gets_on
        return FileEntry(size=0, sha256="")

    monkeypatch.setattr(checkpoint_copy, "mark", lambda: marks.append(1))
    monkeypatch.setattr(checkpoint_copy, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(Copy, "_file", slow)
    (tmp_path / "file").touch()
    Copy(tmp_path, tmp_path, {"file": 0}).wait()
    assert (len(marks) >= 3) == gets_on
    assert gets_on or not marks
