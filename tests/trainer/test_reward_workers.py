"""What users' functions do to their processes: each is reported by the reward's name, and none holds the rank."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reward_kit import alone, completion, of_function, reward, scored, three, write_functions

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.rewards import workers
from posttrain_trainer.rewards.calls import Batch, Call, Task
from posttrain_trainer.rewards.reward_set import RewardSet
from posttrain_trainer.rewards.workers import Worker, call_all, memory_share


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    return write_functions(tmp_path)


GOOD = [
    ("answers", [0, 1, 0]),
    ("later", [1, 2, 3]),
    ("of_helper", [7, 7, 7]),
    ("numpy_array", [0, 1, 2]),
    ("numpy_numbers", [0.5, 2, 1]),
    ("some_none", [1, math.nan, 1]),
    ("rank", [-1, -1, -1]),
    ("light", [0, 0, 0]),
]
BAD = [
    ("raises", ["ZeroDivisionError: division by zero", "of reward.py"]),
    ("raises_later", ["RuntimeError: no service", "of reward.py"]),
    ("nothing", ["nothing returned a NoneType (None)", "a list of 3 numbers or None"]),
    ("text", ["a str ('1, 2, 3')"]),
    ("mapping", ["a dict ({'rewards'"]),
    ("short", ["1 values for 3 completions"]),
    ("leaves", ["SystemExit: 4", "of reward.py"]),
    ("ends", ["exit code 3", "'before the end'"]),
    ("crashes", ["ended by SIGSEGV"]),
    ("killed", ["ended by SIGKILL", "memory"]),
    ("messages", ["TypeError", "strings here, not lists of messages"]),
    ("wants", ["'solution'", "It is given prompts, completions, completion_ids, answer"]),
]
BAD_ROWS = [
    ("nan", 1, "nan returned nan", [1, 2]),
    ("infinite", 2, "infinite returned inf", [1, 2]),
    ("words", 1, "words returned a str ('good')", [1, 2]),
]
UNUSABLE = [
    ("def f(completions):\n    return [1\n", ["is no Python: '[' was never closed at line 2"]),
    ("def g(completions): ...\ndef h(completions): ...\n", ["no function 'f'; it has g, h", "python.function"]),
    ("f = 3\n", ["no function 'f'; it has none"]),
    ("import not_installed_anywhere\n", ["ModuleNotFoundError", "at line 1", "while it was loaded"]),
    ("import sys\nsys.exit(2)\n", ["SystemExit: 2 at line 2"]),
    (None, ["no such file", "configMapRef"]),
]


@pytest.mark.parametrize(("function", "values"), GOOD)
def test_good_functions(functions: Path, monkeypatch: pytest.MonkeyPatch, function: str, values: list[float]) -> None:
    monkeypatch.setenv("RANK", "5")  # ours: a function must not take it for its own
    result = scored(of_function(functions, function), three())
    assert result.values[:, 0].tolist() == pytest.approx(values, nan_ok=True)
    assert result.failures == {"mine": 0}
    assert result.seconds["mine"] > 0


@pytest.mark.parametrize(("function", "words"), BAD)
def test_bad_functions(functions: Path, function: str, words: list[str]) -> None:
    with pytest.raises(TrainerFailure) as caught:
        scored(of_function(functions, function), three())
    assert caught.value.reason is Reason.REWARD_ERROR
    assert caught.value.message.startswith("reward 'mine': ")
    assert [word for word in [*words, "onError"] if word not in caught.value.message] == []


def test_the_traceback_is_in_the_log(functions: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "posttrain_trainer.rewards")
    rewards = RewardSet([of_function(functions, "raises", on_error="Skip")], alone)
    try:
        rewards.score(three())
        assert "reward mine:     def raises(completions): return [1 / 0]" in caplog.text
    finally:
        rewards.close()


@pytest.mark.parametrize(("function", "place", "what", "kept"), BAD_ROWS)
def test_bad_values_are_of_their_rows(functions: Path, function: str, place: int, what: str, kept: list[float]) -> None:
    with pytest.raises(TrainerFailure) as caught:
        scored(of_function(functions, function), three())
    assert what in caught.value.message
    assert f"(completion {place} of 3, row {11 + place})" in caught.value.message
    result = scored(of_function(functions, function, on_error="Skip"), three())
    values = result.values[:, 0].tolist()
    assert math.isnan(values.pop(place))
    assert values == kept
    assert result.failures == {"mine": 1}


@pytest.mark.parametrize(("source", "words"), UNUSABLE)
def test_what_can_never_score_ends_the_job_whatever_on_error_says(
    tmp_path: Path, source: str | None, words: list[str]
) -> None:
    path = tmp_path / "user.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(TrainerFailure) as caught:
        scored(of_function(path, "f", on_error="Zero"), three())
    assert caught.value.reason is Reason.REWARD_ERROR
    assert [word for word in ["reward 'mine'", *words] if word not in caught.value.message] == []


@pytest.mark.parametrize(("on_error", "value"), [("Zero", 0.0), ("Skip", math.nan)])
def test_on_error(functions: Path, caplog: pytest.LogCaptureFixture, on_error: str, value: float) -> None:
    result = scored(of_function(functions, "short", on_error=on_error), three())
    assert result.values[:, 0].tolist() == pytest.approx([value] * 3, nan_ok=True)
    assert result.failures == {"mine": 3}
    assert "reward 'mine': short returned 1 values" in caplog.text
    assert "applied to 3 of 3" in caplog.text


@pytest.mark.parametrize("function", ["loops", "ignores_signals"])
def test_a_hang_costs_its_deadline_and_the_next_call_works(functions: Path, tmp_path: Path, function: str) -> None:
    hangs = of_function(functions, function, timeout_seconds=0.5, on_error="Zero")
    other = reward(name="other", python={"path": str(functions), "function": "answers"})
    rewards = RewardSet([hangs, other], alone)
    try:
        assert rewards.score(three()).failures == {"mine": 3, "other": 0}  # all are loaded
        begun = time.monotonic()
        result = rewards.score(three())
        assert time.monotonic() - begun < 10  # the machine may be busy; without a limit it would be for ever
        assert result.values.tolist() == [[0, 0], [0, 1], [0, 0]]
        assert result.seconds["other"] < result.seconds["mine"]
    finally:
        rewards.close()


def test_a_killed_process_is_replaced(functions: Path, tmp_path: Path) -> None:
    rewards = RewardSet([of_function(functions, "once", timeout_seconds=1.5, on_error="Skip")], alone)
    try:
        completions = three(folder=str(tmp_path))
        assert rewards.score(completions).failures == {"mine": 3}
        again = rewards.score(completions)
        assert again.values[:, 0].tolist() == [1, 1, 1]
        assert again.failures == {"mine": 0}
    finally:
        rewards.close()


def test_a_process_that_ended_between_two_calls_is_replaced(functions: Path) -> None:
    rewards = RewardSet([of_function(functions, "number")], alone)
    try:
        first = rewards.score(three()).values[0, 0]
        os.kill(int(first), signal.SIGKILL)
        os.waitid(os.P_PID, int(first), os.WEXITED | os.WNOWAIT)  # all its threads have ended, nobody has reaped it
        assert rewards.score(three()).values[0, 0] != first
    finally:
        rewards.close()


def test_what_a_function_started_ends_with_it(functions: Path, tmp_path: Path) -> None:
    scored(
        of_function(functions, "child_of_its_own", timeout_seconds=1.0, on_error="Skip"), three(folder=str(tmp_path))
    )
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_flood_is_cut(functions: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "posttrain_trainer.rewards")
    rewards = RewardSet([of_function(functions, "floods")], alone)
    try:
        assert rewards.score(three()).values[:, 0].tolist() == [1, 1, 1]
        rewards.score(three())
    finally:
        rewards.close()
    assert 10_000 < len(caplog.text) < 50_000
    assert "bytes more that it printed are not shown" in caplog.text


def test_memory_is_limited(functions: Path) -> None:
    worker = Worker("mine", Task("python", {"path": str(functions), "function": "hogs"}), 300 << 20)
    try:
        (outcome,) = call_all([(worker, Call(Batch(["a"], ["b"], [[1]], {}, [0]), 60.0))])
    finally:
        worker.close()
    assert outcome.reply.failure is not None
    assert "0.3 (half" in outcome.reply.failure
    assert outcome.seconds < 30


def test_share_of_memory() -> None:
    whole = memory_share(1)
    assert 0 < whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    assert memory_share(4) == whole // 4


def test_a_file_that_hangs_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START_SECONDS", 0.5)
    path = tmp_path / "user.py"
    path.write_text("import time\ntime.sleep(1000)\ndef f(completions): return [1.0]\n")
    with pytest.raises(TrainerFailure, match=r"reward 'mine': it was not loaded after 0\.5 s"):
        scored(of_function(path, "f"), three())


def test_a_large_batch_and_a_process_that_does_not_read(functions: Path) -> None:
    many = [completion("x" * 20_000, number=n, answer="x") for n in range(500)]  # 10 MB: far more than a socket holds
    assert scored(of_function(functions, "answers"), many).values.sum() == 500
    rewards = RewardSet([of_function(functions, "answers", timeout_seconds=2.0, on_error="Zero")], alone)
    try:
        rewards.score(three())
        worker: Any = rewards._workers["mine"]
        os.kill(worker._process.pid, signal.SIGSTOP)
        assert rewards.score(many).failures == {"mine": 500}
    finally:
        rewards.close()


def test_a_key_of_a_config_map(tmp_path: Path) -> None:
    """As the kubelet mounts it: a link to a link, and any name."""
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026" / "score").write_text("def f(completions): return [1.0] * len(completions)\n")
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "score").symlink_to("..data/score")
    assert scored(of_function(tmp_path / "score", "f"), three()).values.sum() == 3
    (tmp_path / "..2026" / "score").write_text("def f(completions): return [1 / 0]\n")
    with pytest.raises(TrainerFailure, match="division by zero at line 1 of score"):
        scored(of_function(tmp_path / "score", "f"), three())


def test_close_ends_the_process(functions: Path) -> None:
    rewards = RewardSet([of_function(functions, "answers")], alone)
    worker: Any = rewards._workers["mine"]
    rewards.score(three())
    rewards.close()
    assert not Path(f"/proc/{worker._process.pid}").exists()


def test_no_process_outlives_a_rank_that_is_killed(functions: Path) -> None:
    source = f"""if True:
        import time
        from posttrain_trainer.rewards.calls import Batch, Call, Task
        from posttrain_trainer.rewards.workers import Worker
        worker = Worker("mine", Task("python", {{"path": {str(functions)!r}, "function": "loops"}}), 1 << 30)
        while not worker._line.look(): time.sleep(0.01)
        worker._line.put(Call(Batch(["a"], ["b"], [[1]], {{}}, [0]), 1000.0))
        worker._line.look()
        time.sleep(0.3)  # it loops now, and reads nothing
        print(worker._process.pid, flush=True)
        time.sleep(1000)
    """
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None
        pid = int(rank.stdout.readline())
        assert gone(pid) is False
        rank.kill()
    deadline = time.monotonic() + 20
    while not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(pid: int) -> bool:
    """Ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_columns_with_our_names_are_refused(functions: Path) -> None:
    with pytest.raises(TrainerFailure, match="column 'completion_ids'"):
        scored(of_function(functions, "answers"), three(completion_ids=[1]))


def test_answers_that_cannot_be_read_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rewards = RewardSet([reward(name="right", exact_match={"column": "answer"})], alone)
    try:
        for _ in range(2):
            assert np.isnan(rewards.score([completion("yes", number=5, answer=" ")]).values).all()
    finally:
        rewards.close()
    assert caplog.text.count("reward 'right': 1 of 1 completions are skipped") == 1
    assert "in row 5" in caplog.text


def test_no_completions(functions: Path) -> None:
    rewards = RewardSet([of_function(functions, "answers"), reward(name="short", length={"max_tokens": 3})], alone)
    try:
        assert rewards.score([]).values.shape == (0, 2)
    finally:
        rewards.close()


def test_names_weights_and_columns_of_values(functions: Path) -> None:
    configs = [
        reward(name="second", weight=0.5, length={"max_tokens": 1}),
        reward(name="first", weight=2.0, python={"path": str(functions), "function": "answers"}),
    ]
    rewards = RewardSet(configs, alone)
    try:
        assert (rewards.names, rewards.weights) == (("second", "first"), (0.5, 2.0))
        assert rewards.score(three()).values.tolist() == [[1, 0], [0, 1], [0, 0]]
    finally:
        rewards.close()
