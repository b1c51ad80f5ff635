"""What the launcher decides without starting anything: verdicts, attempts, configuration, devices."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepare_kit import job, write_config

from posttrain_api import names
from posttrain_api.reasons import REASONS, Effect, Reason
from posttrain_api.records import Output, Success
from posttrain_api.trainer import Topology
from posttrain_trainer import attempt, environment
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.linux import out_of_memory_kills
from posttrain_trainer.record import End
from posttrain_trainer.verdict import Seen, judge

SUCCESS = Success(output=Output(uri="pvc://r/o", digest="sha256:0", format="safetensors", size_bytes=1), step=9)
TRAINER_REASONS = [reason for reason, info in REASONS.items() if info.exit_code is not None]


def end(rank: int, reason: Reason | None, second: int = 0) -> End:
    time = f"2030-01-01T00:00:{second:02d}.000000Z"
    return End(rank=rank, reason=reason, message=str(reason), time=time, success=SUCCESS if rank == 0 else None)


def test_success_stands_whatever_comes_after() -> None:
    ends = {0: end(0, None), 1: end(1, None)}
    verdict = judge(Seen([0, 1], code=1, ends=ends, exits={1: -6}, stopped=True))
    assert (verdict.reason, verdict.success) == (None, SUCCESS)


def test_success_without_rank_0s_record_is_none() -> None:
    ends = {0: End(rank=0, time="t")}
    assert judge(Seen([0], code=0, ends=ends)).reason is Reason.TRAINER_ERROR


def test_first_cause_in_time_not_first_consequence() -> None:
    ends = {0: end(0, Reason.PEER_LOST, 1), 1: end(1, Reason.HANG, 3), 2: end(2, Reason.TRAINER_ERROR, 2)}
    assert judge(Seen([0, 1, 2], 1, ends)).reason is Reason.TRAINER_ERROR


def test_broken_group_is_peer_lost_though_torchrun_stops_the_others() -> None:
    ends = {0: end(0, Reason.PREEMPTED, 5), 1: end(1, Reason.PEER_LOST, 4)}
    assert judge(Seen([0, 1], 1, ends)).reason is Reason.PEER_LOST


def test_killed_for_memory() -> None:
    seen = Seen([0], 1, exits={0: -9}, exits_time="t", memory_kills=1)
    assert judge(seen).reason is Reason.OUT_OF_MEMORY


def test_nothing_known() -> None:
    assert judge(Seen([0], 1)).reason is Reason.TRAINER_ERROR
    assert judge(Seen([0], -9)).reason is Reason.PROCESS_KILLED


@given(
    reasons=st.lists(st.sampled_from(TRAINER_REASONS), min_size=1, max_size=4),
    seconds=st.permutations(range(4)),
    stopped=st.booleans(),
)
def test_truthful_codes(reasons: list[Reason], seconds: list[int], stopped: bool) -> None:
    """Never 0 where a rank failed; below 128 only where a rank said so; 143 after SIGTERM otherwise."""
    ends = {rank: end(rank, reason, seconds[rank]) for rank, reason in enumerate(reasons)}
    verdict = judge(Seen(range(len(reasons)), 1, ends, stopped=stopped))
    permanent = any(REASONS[reason].effect is Effect.FAILED for reason in reasons)
    assert verdict.exit_code != 0
    assert (verdict.exit_code < 128) is permanent
    if stopped and not permanent:
        assert verdict.exit_code == (163 if Reason.GUARD_SUSPENDED in reasons else 143)


def test_attempts_count_and_forget_fruitless_ones_after_progress(tmp_path: Path) -> None:
    def checkpoint(step: int) -> None:
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")

    assert (attempt.begin(tmp_path).attempt, attempt.begin(tmp_path).fruitless) == (1, 1)
    assert attempt.begin(tmp_path).fruitless == 2
    checkpoint(10)
    (tmp_path / "checkpoints" / "step-000020.tmp-3").mkdir()
    (tmp_path / "checkpoints" / "step-000020.tmp-3" / "manifest.json").write_text("{}")
    progressed = attempt.begin(tmp_path)
    assert (progressed.attempt, progressed.fruitless, progressed.checkpoint_step) == (4, 0, 10)
    (tmp_path / "attempt.json").write_text('{"attempt": 9, "newField": 1}')
    assert attempt.begin(tmp_path).attempt == 10


@given(st.integers(0, 40), st.floats(0, 1, exclude_max=True))
def test_backoff(fruitless: int, chance: float) -> None:
    seconds = attempt.backoff_seconds(fruitless, chance, {})
    full = min(2**fruitless, 30)
    assert seconds == 0 if fruitless == 0 else full / 2 <= seconds <= full
    assert attempt.backoff_seconds(fruitless, chance, {"POSTTRAIN_BACKOFF_SCALE": "0"}) == 0


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "no TrainerConfig"),
        ('{"contract": 99}', "contract 99"),
        ('{"contract": 1, "stage": "Poetry"}', "Field required"),
    ],
)
def test_unreadable_config_is_image_incompatible(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(TrainerFailure, match=part) as caught:
        environment.load_config({names.ENV_CONFIG: str(path)})
    assert caught.value.reason is Reason.IMAGE_INCOMPATIBLE
    assert "one release" in caught.value.message


def test_config_round_trip(tmp_path: Path) -> None:
    config = job(tmp_path, tmp_path / "train.jsonl")
    assert environment.load_config({names.ENV_CONFIG: str(write_config(config, tmp_path))}) == config


def test_place_among_nodes(tmp_path: Path) -> None:
    config = job(tmp_path, tmp_path, topology=Topology(nodes=2, processes_per_node=2, gpus_per_node=0))
    pet = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "2",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "m",
        "PET_MASTER_PORT": "7",
    }
    assert environment.node_of(pet, config) == environment.Node(1, 2, "m", 7)
    older = {"PET_NNODES": "2", "RANK": "1", "MASTER_ADDR": "m", "MASTER_PORT": "7"}
    assert environment.node_of(older, config) == environment.Node(1, 2, "m", 7)
    for wrong in ({}, {**pet, "PET_NPROC_PER_NODE": "4"}, {**pet, "PET_NODE_RANK": "x"}):
        with pytest.raises(TrainerFailure):
            environment.node_of(wrong, config)
    single = job(tmp_path, tmp_path)
    assert environment.node_of({}, single) == environment.Node(0, 1, "127.0.0.1", None)


def test_gpus_asked_for_and_none_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "DEVICE_FILES", ())
    with pytest.raises(TrainerFailure, match=r"asks for 2 GPUs.*sees 0") as caught:
        environment.uses_cpu({}, 2)
    assert caught.value.reason is Reason.IMAGE_INCOMPATIBLE
    assert environment.uses_cpu({names.ENV_ALLOW_CPU: "true"}, 2)
    assert environment.uses_cpu({}, 0)


def test_a_driver_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "DEVICE_FILES", ("/dev/null",))
    monkeypatch.setattr(environment, "GPU_SECONDS", 0.2)
    monkeypatch.setattr(environment, "_COUNT", "import time; time.sleep(60)")
    with pytest.raises(TrainerFailure, match=r"in 0\.2 s.*driver") as caught:
        environment.uses_cpu({}, 1)
    assert caught.value.reason is Reason.IMAGE_INCOMPATIBLE


_RAISING_TICK = """
import os, pathlib, sys
from posttrain_trainer.supervise import Supervisor

def tick():
    raise OSError(28, "No space left on device")

supervisor = Supervisor()
supervisor.install()
try:
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    supervisor.run([sys.executable, "-c", child], os.environ, tick)
except OSError:
    pid = int(supervisor.log.tail())
    print("left" if pathlib.Path(f"/proc/{pid}").exists() else "gone")
"""


def test_no_child_outlives_a_tick_that_raises() -> None:
    """A full storage raises where node 0's pulse is written."""
    command = [sys.executable, "-c", _RAISING_TICK]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=50)
    assert done.stdout.splitlines()[-1] == "gone"


def test_memory_events(tmp_path: Path) -> None:
    assert out_of_memory_kills(tmp_path / "none") == 0
    (tmp_path / "events").write_text("low 0\noom 3\noom_kill 2\n")
    assert out_of_memory_kills(tmp_path / "events") == 2


def test_attempt_file_is_what_the_fence_reads(tmp_path: Path) -> None:
    assert attempt.begin(tmp_path).attempt == json.loads((tmp_path / names.ATTEMPT_FILE).read_text())["attempt"]
