"""Which checkpoint is resumed, and what is refused: never a silent fresh start, never a good one lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from trainer_kit import (
    call,
    exported,
    make_config,
    make_model,
    prepare,
    rows,
    run_ranks,
    run_worker,
    steady_lines,
    succeed,
)

from posttrain_trainer.checkpoint_files import committed


def _job(run_dir: Path, rows_seed: int = 0, **changes: Any) -> Any:
    config = make_config(run_dir, **{"checkpoint__every_steps": 2, "checkpoint__keep_last": 2, **changes})
    if not (run_dir / "model").exists():
        make_model(run_dir / "model")
    prepare(config, rows(25, rows_seed), data_digest=f"sha256:data{rows_seed}")
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of six steps that is done: checkpoints of steps 4 and 6."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    succeed(_job(run_dir))
    assert _steps(run_dir) == [6, 4]
    return run_dir


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Any:
    """The same job on a copy of its storage, before its second attempt."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "output")
    return _job(run_dir)


def _steps(run_dir: Path) -> list[int]:
    return [entry.manifest.step for entry in committed(run_dir / "checkpoints")]


def _resumed_at(config: Any, attempt: int = 2) -> int | None:
    text = (Path(config.run_dir) / f"logs-{attempt}" / "rank-0.log").read_text()
    found = [line.rpartition(" ")[2] for line in text.splitlines() if "resumed from" in line]
    return int(found[0]) if found else None


def _refused(config: Any, ranks: int = 1) -> str:
    ends = run_worker(config, ranks, 2)
    assert {end["reason"] for end in ends} == {"CheckpointIncompatible"}
    assert {end["exitCode"] for end in ends} == {50}
    return str(ends[0]["message"])


def test_a_finished_job_only_exports(again: Any, finished: Path) -> None:
    success = succeed(again, attempt=2)
    assert _resumed_at(again) == 6
    line = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step": 6, **success["metrics"]} == line
    assert success["checkpoint"]["step"] == 6
    assert success["checkpoint"]["saveSeconds"] > 0, "as it was measured then"
    assert exported(again) == exported(_job(finished))


def test_torn_checkpoint_is_skipped(again: Any, finished: Path) -> None:
    (Path(again.run_dir) / "checkpoints" / "step-000006" / "manifest.json").unlink()
    succeed(again, attempt=2)
    assert _resumed_at(again) == 4
    assert exported(again) == exported(_job(finished))
    assert steady_lines(again) == steady_lines(_job(finished))
    assert _steps(Path(again.run_dir)) == [6, 4]


def test_wrong_digest_takes_the_older(again: Any, finished: Path) -> None:
    _flip(Path(again.run_dir), 6)
    succeed(again, attempt=2)
    assert _resumed_at(again) == 4
    assert exported(again) == exported(_job(finished))


def test_no_whole_one_left_is_an_error(again: Any) -> None:
    _flip(Path(again.run_dir), 6)
    _flip(Path(again.run_dir), 4)
    message = _refused(again)
    assert "step-000006/ds/mp_rank_00_model_states.pt: sha256:" in message
    assert "step-000004" in message
    assert _steps(Path(again.run_dir)) == [6, 4]


def test_what_was_committed_and_is_lost_is_an_error(again: Any) -> None:
    """Steps that were reported as saved are not done again in silence."""
    for step in (4, 6):
        (Path(again.run_dir) / "checkpoints" / f"step-00000{step}" / "manifest.json").unlink()
    assert "step 6 was committed there, and no checkpoint is left" in _refused(again)
    shutil.rmtree(Path(again.run_dir) / "checkpoints")
    assert "step 6 was committed there, and no checkpoint is left" in _refused(again)


def test_what_was_never_committed_is_a_fresh_start(again: Any, finished: Path) -> None:
    """As a save leaves it that was killed before the first commit."""
    for step in (4, 6):
        (Path(again.run_dir) / "checkpoints" / f"step-00000{step}" / "manifest.json").unlink()
    (Path(again.run_dir) / "committed.json").unlink()
    succeed(again, attempt=2)
    assert _resumed_at(again) is None
    assert exported(again) == exported(_job(finished))
    assert len(steady_lines(again)) == 6


def test_never_begins_anew(again: Any) -> None:
    config = _job(Path(again.run_dir), checkpoint__resume="Never", training__max_steps=2)
    succeed(config, attempt=2)
    assert _resumed_at(config) is None
    assert len(steady_lines(config)) == 2
    assert _steps(Path(again.run_dir)) == [6, 2]  # of the two that are kept the older is attempt 1's last


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training__batch_size": 5}, "training.batchSize is 6 there and 5 here"),
        ({"training__seed": 8}, "training.seed is 7 there and 8 here"),
        ({"rows_seed": 1}, "data digest is 'sha256:data0' there and 'sha256:data1' here"),
        ({"training__learning_rate": 0.5}, "training.learningRate is 0.01 there and 0.5 here"),
        ({"zero_stage": 2}, "deepspeed.zeroStage is 0 there and 2 here"),
    ],
)
def test_another_configuration_is_refused(again: Any, changes: dict[str, Any], said: str) -> None:
    assert said in _refused(_job(Path(again.run_dir), **changes))


def test_another_world_size_is_refused(again: Any) -> None:
    said = _refused(again, ranks=2)
    assert "world size is 1 there and 2 here" in said
    assert "goes on in a new job, whose checkpoint.from names this one" in said


def test_another_model_is_refused(again: Any) -> None:
    run_dir = Path(again.run_dir)
    shutil.rmtree(run_dir / "model")
    make_model(run_dir / "model", seed=4)
    assert "model digest is 'sha256:" in _refused(_job(run_dir))


def test_a_model_changed_under_the_job_is_refused(again: Any) -> None:
    shutil.rmtree(Path(again.run_dir) / "model")
    make_model(Path(again.run_dir) / "model", seed=4)
    end = run_worker(again, attempt=2)[0]
    assert end["reason"] == "ModelIncompatible"
    assert "its files changed after this job had begun" in end["message"]


@pytest.mark.parametrize("folder", ["checkpoints", "checkpoints/step-000004"])
def test_start_from_another_job(finished: Path, tmp_path: Path, folder: str) -> None:
    """Longer and slower than the other; the rows go on where the other stopped."""
    shutil.copytree(finished / "model", tmp_path / "model")
    source = {"uri": "pvc://runs/other", "path": str(finished / folder)}
    changes = {"training__max_steps": 8, "training__learning_rate": 1e-3, "checkpoint__start_from": source}
    config = _job(tmp_path, **changes)
    success = succeed(config)
    step = 6 if folder == "checkpoints" else 4
    assert _resumed_at(config, 1) == step
    assert [line["step"] for line in steady_lines(config)] == list(range(step + 1, 9))
    assert success["checkpoint"]["uri"] == "pvc://runs/tiny/u1/checkpoints/step-000008"
    assert _steps(finished) == [6, 4]


def test_the_optimizer_is_the_new_jobs(finished: Path, tmp_path: Path) -> None:
    """DeepSpeed loads betas, epsilon and decay with the moments: they must not stay those of the other job."""
    found = []
    for decay in (0.1, 0.9):
        run_dir = tmp_path / str(decay)
        shutil.copytree(finished / "model", run_dir / "model")
        source = {"uri": "pvc://runs/other", "path": str(finished / "checkpoints" / "step-000004")}
        config = _job(run_dir, training__weight_decay=decay, checkpoint__start_from=source)
        succeed(config)
        found.append(exported(config))
    assert found[0] == exported(_job(finished))
    assert found[1] != found[0]


def test_start_from_is_refused_where_it_cannot_fit(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "model", tmp_path / "model")
    (tmp_path / "empty").mkdir()
    empty = {"uri": "pvc://runs/other", "path": str(tmp_path / "empty")}
    assert "holds no committed checkpoint" in _refused(_job(tmp_path, checkpoint__start_from=empty))
    other = {"uri": "pvc://runs/other", "path": str(finished / "checkpoints")}
    assert "data digest" in _refused(_job(tmp_path, rows_seed=1, checkpoint__start_from=other))
    short = _job(tmp_path, training__max_steps=3, checkpoint__start_from=other)
    assert "at step 6, this job ends at step 3" in _refused(short)


def test_a_newer_attempt_fences_the_old_one(again: Any) -> None:
    run_dir = Path(again.run_dir)
    (run_dir / "attempt.json").write_text('{"attempt": 3}')
    (run_dir / "checkpoints" / "step-000006" / "manifest.json").unlink()
    before = sorted(run_dir.rglob("*"))
    end = run_worker(again, attempt=2)[0]
    assert end["reason"] == "PeerLost"
    assert "attempt 3 has taken over" in end["message"]
    written = [path for path in run_dir.rglob("*") if path not in before and "checkpoints" in path.parts]
    assert written == []


def test_a_newer_attempt_fences_the_export(again: Any) -> None:
    """The old one finds its last checkpoint whole and has only to export."""
    run_dir = Path(again.run_dir)
    (run_dir / "output.tmp-3").mkdir()  # the newer one is exporting, too
    _overtaken(run_dir, "export", 2)
    assert sorted(path.name for path in run_dir.glob("output*")) == ["output.tmp-3"]


def test_a_newer_attempt_fences_the_commit(tmp_path: Path) -> None:
    _job(tmp_path)
    _overtaken(tmp_path, "save", 1)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _overtaken(run_dir: Path, place: str, attempt: int) -> None:
    result = run_dir / "found.json"
    env = {"POSTTRAIN_CONFIG": str(run_dir / "config.json"), "POSTTRAIN_ATTEMPT": str(attempt)}
    run_ranks(call, ("overtaken", place, str(result)), 1, run_dir / "logs", **env)
    end = json.loads(result.read_text())
    assert end["reason"] == "PeerLost"
    assert "attempt 3 has taken over" in end["message"]


def test_every_seconds_saves_without_every_steps(tmp_path: Path) -> None:
    config = _job(tmp_path, checkpoint__every_steps=None, checkpoint__every_seconds=0, training__max_steps=3)
    succeed(config)
    assert _steps(tmp_path) == [3, 2]


def _on_small_storage(tmp_path: Path, size: str) -> dict[str, Any]:
    _job(tmp_path, checkpoint__keep_last=5)
    result = tmp_path / "found.json"
    env = {"POSTTRAIN_CONFIG": str(tmp_path / "config.json"), "POSTTRAIN_ATTEMPT": "1"}
    run_ranks(call, ("on_small_storage", size, str(result)), 1, tmp_path / "logs", **env)
    found: dict[str, Any] = json.loads(result.read_text())
    if "skipped" in found:
        pytest.skip(found["skipped"])
    return found


def test_full_storage_keeps_the_older_checkpoints(tmp_path: Path) -> None:
    """A tmpfs that takes one checkpoint (about 320 KB) and no second."""
    found = _on_small_storage(tmp_path, "480k")
    assert found["reason"] == "StorageFull"
    assert found["whole"] == ["step-000002"]
    assert not [name for name in found["names"] if "tmp" in name or "000004" in name]
    assert "checkpoint.keepLast" in found["message"]


def test_a_storage_that_takes_two_has_room_for_the_newest(tmp_path: Path) -> None:
    """And no third: the oldest goes before the next is written."""
    found = _on_small_storage(tmp_path, "800k")
    assert found["reason"] is None
    assert found["whole"] == ["step-000006", "step-000004"]


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 0), (2, 2), (1, 3)])
def test_non_finite_ends_with_the_last_good_checkpoint(tmp_path: Path, ranks: int, zero: int) -> None:
    """The first step throws the weights to 1e30, so that the second cannot be computed."""
    config = _job(
        tmp_path,
        zero_stage=zero,
        checkpoint__every_steps=1,
        training__learning_rate=1e30,
        training__warmup_steps=0,
        topology__processes_per_node=ranks,
    )
    ends = run_worker(config, ranks)
    assert {(end["reason"], end["exitCode"], end["step"]) for end in ends} == {("NonFinite", 40, 1)}
    assert _steps(tmp_path) == [1]


def _flip(run_dir: Path, step: int) -> None:
    path = run_dir / "checkpoints" / f"step-00000{step}" / "ds" / "mp_rank_00_model_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
