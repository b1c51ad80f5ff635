"""What the launcher makes of faulthandler's text; marks and pulse; the watch's limits. No processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from posttrain_api import names
from posttrain_api.reasons import Reason
from posttrain_api.records import MAX_LOG_TAIL_BYTES, MAX_STACKS_BYTES, MAX_WHERE
from posttrain_trainer import signs, stacks
from posttrain_trainer.pulse import Pulse
from posttrain_trainer.stacks import Hang, Stack
from posttrain_trainer.verdict import Seen, judge
from posttrain_trainer.vigil import ENV_MARGIN_SECONDS, Limits

TEXT = """Thread 0x00007f01 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 331 in wait
  File "/usr/lib/python3.11/threading.py", line 1002 in _bootstrap

Current thread 0x00007f02 (most recent call first):
  File "/env/torch/distributed/distributed_c10d.py", line 2825 in all_reduce
  File "/env/torch/distributed/c10d_logger.py", line 81 in wrapper
  File "/env/posttrain_trainer/runtime.py", line 102 in _reduce
  File "/env/posttrain_trainer/runtime.py", line 74 in any
  File "/env/posttrain_trainer/loop.py", line 190 in _stopping
  File "/env/posttrain_trainer/loop.py", line 90 in run
"""


def test_where_a_rank_is_in_one_line() -> None:
    assert stacks.where_of(TEXT) == (
        "all_reduce (distributed_c10d.py:2825) < _reduce (runtime.py:102) < any (runtime.py:74) < "
        "_stopping (loop.py:190)"
    )
    assert stacks.where_of("Thread 0x1 (most recent call first):\n") == "in no Python code"
    assert stacks.where_of("") == "in no Python code"


def test_the_main_thread_is_kept_where_a_text_is_cut() -> None:
    assert stacks.main_first(TEXT).startswith("Current thread 0x00007f02")
    assert stacks.main_first(TEXT).rstrip().endswith("line 1002 in _bootstrap")
    many = "\n\n".join([TEXT.split("\n\n")[0]] * 500 + [TEXT.split("\n\n")[1]])
    short = stacks.cut(stacks.main_first(many))
    assert "all_reduce" in short
    assert MAX_STACKS_BYTES - 4 <= len(short.encode()) <= MAX_STACKS_BYTES
    assert stacks.cut("ä" * MAX_STACKS_BYTES).endswith("… cut")


def test_a_rank_that_never_said_which_process_it_is(tmp_path: Path) -> None:
    (only,) = stacks.collect(tmp_path, [3], None, seconds=0.2)
    assert (only.rank, only.answered) == (3, False)
    assert "has not begun, or its process has ended" in only.where
    assert len(only.where) <= MAX_WHERE


def test_a_number_that_is_another_process_now_is_not_signalled(tmp_path: Path) -> None:
    """SIGUSR1 would end this very process, which is not a child of the named one."""
    signs.process_file(tmp_path, 0).write_text(str(os.getpid()))
    (only,) = stacks.collect(tmp_path, [0], parent=os.getpid(), seconds=0.2)
    assert not only.answered


def test_marks_count_only_after_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signs.ENV_SIGNS, str(tmp_path))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setattr(signs._Process, "watched", False)
    signs.mark()
    assert signs.marks(tmp_path) == {}
    signs.begin()
    assert list(signs.marks(tmp_path)) == ["mark-2"]
    assert signs.marks(tmp_path, but="2") == {}


def test_pulse_is_of_changes_not_of_times(tmp_path: Path) -> None:
    now = [1000.0]
    pulse = Pulse(tmp_path, lambda: now[0])
    assert pulse.look() is None
    signs.touch(tmp_path, "0")
    signs.touch(tmp_path, "1")
    assert pulse.look() == 1000
    now[0] = 1060
    assert pulse.look() == 1000
    os.utime(tmp_path / "mark-1", (5, 5))  # the clock was set back by decades, and a rank got on
    assert pulse.look() == 1060


def test_a_growing_file_is_an_advance_and_a_still_one_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "signs", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    monkeypatch.setenv(signs.ENV_SIGNS, str(folder))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(signs._Process, "watched", True)
    with signs.growing(out, seconds=0.02), (out / "model").open("wb", buffering=0) as file:
        _wait(lambda: signs.marks(folder))  # the first look
        before = signs.marks(folder)
        time.sleep(0.2)
        assert signs.marks(folder) == before
        file.write(b"more")
        _wait(lambda: signs.marks(folder) != before)


def _wait(condition: object) -> None:
    deadline = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("told", "server", "expected"), [(None, False, 600), (None, True, 640), (60, True, 100), (60, False, 60)]
)
def test_the_launcher_is_later_than_the_operator(told: int | None, server: bool, expected: float) -> None:
    limits = Limits.of({names.ENV_STALL_SECONDS: "600", ENV_MARGIN_SECONDS: "40"})
    assert limits.seconds(told, server) == expected
    assert Limits.of({}).seconds(None, has_server=True) == 2100


def test_the_verdict_of_a_hang_names_first_who_cannot_answer() -> None:
    answers = Stack(0, "all_reduce (x.py:1)", "all_reduce (x.py:1)\n" + "frame\n" * 2000)
    stopped = Stack(1, stacks.CANNOT + "it is stopped", stacks.CANNOT + "it is stopped")
    seen = Seen([0, 1], code=-9, exits={0: -9, 1: -9}, hang=Hang(1900, 1800, 7, [answers, stopped], "pvc://a/stacks/"))
    verdict = judge(seen)
    assert (verdict.reason, verdict.exit_code, verdict.rank, verdict.step) == (Reason.HANG, 161, 1, 7)
    assert verdict.message.index("rank 1: cannot answer") < verdict.message.index("rank 0: all_reduce")
    assert "pvc://a/stacks/" in verdict.message
    assert verdict.tail is not None
    assert verdict.tail.startswith(stacks.CANNOT)
    assert len(verdict.tail.encode()) <= MAX_LOG_TAIL_BYTES


def test_a_run_that_was_told_to_stop_is_preempted_even_if_it_hangs() -> None:
    hang = Hang(1900, 1800, None, [Stack(0, "x", "x")], None)
    assert judge(Seen([0], code=-9, stopped=True, hang=hang)).reason is Reason.PREEMPTED
