"""Completions and rewards for tests, with one file of users' functions, good and bad."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_api.online import RewardConfig
from posttrain_trainer.rewards.base import Completion
from posttrain_trainer.rewards.reward_set import RewardSet

FUNCTIONS = """
import asyncio, fractions, os, signal, subprocess, sys, threading, time
import numpy as np
from helper import NUMBER

def answers(prompts, completions, answer, **kwargs):
    return [float(right in text) for right, text in zip(answer, completions)]

async def later(completions, completion_ids):
    await asyncio.sleep(0.01)
    return [float(len(ids)) for ids in completion_ids]

def of_helper(completions): return [NUMBER] * len(completions)
def numpy_array(completions): return np.arange(len(completions), dtype=np.float32)
def numpy_numbers(completions): return [np.float16(0.5), np.int64(2), True]
def some_none(completions): return [1, None, fractions.Fraction(1, 2).numerator]
def raises(completions): return [1 / 0]
async def raises_later(completions): raise RuntimeError("no service")
def nothing(completions): return None
def text(completions): return "1, 2, 3"
def mapping(completions): return {"rewards": [1, 2, 3]}
def short(completions): return [1.0]
def nan(completions): return [1.0, float("nan"), 2.0]
def infinite(completions): return [1.0, 2.0, 10 ** 400]
def words(completions): return [1.0, "good", 2.0]
def leaves(completions): sys.exit(4)
def ends(completions):
    print("before the end", flush=True)
    os._exit(3)
def crashes(completions): os.kill(os.getpid(), signal.SIGSEGV)
def killed(completions): os.kill(os.getpid(), signal.SIGKILL)
def loops(completions):
    while True: pass
def ignores_signals(completions):
    for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)
def child_of_its_own(completions, folder):
    process = subprocess.Popen(["sleep", "1000"])
    with open(folder[0] + "/pid", "w") as file: file.write(str(process.pid))
    time.sleep(1000)
def floods(completions):
    ends = time.monotonic() + 0.3
    while time.monotonic() < ends: os.write(1, b"x" * 999 + b"\\n")
    return [1.0] * len(completions)
def hogs(completions):
    held = []
    while True:
        held.append(bytearray(b"x" * 20_000_000)); time.sleep(0.02)
def messages(completions): return [len(completion[0]["content"]) for completion in completions]
def wants(completions, solution): return [1.0] * len(completions)
def rank(completions): return [float(os.environ.get("RANK", -1))] * len(completions)
def light(completions): return [float(bool({"torch", "pydantic"} & sys.modules.keys()))] * len(completions)
def number(completions): return [float(os.getpid())] * len(completions)
def once(completions, folder):
    path = folder[0] + "/seen"
    if not os.path.exists(path):
        open(path, "w").close(); time.sleep(1000)
    return [1.0] * len(completions)
def on_rank_1(completions, rank):
    if rank[0] == 1: raise ValueError("only here")
    return [1.0] * len(completions)

def hangs_on_rank_1(completions, rank):
    if rank[0] == 1: time.sleep(1000)
    return [1.0] * len(completions)

def nan_on_rank_1(completions, rank):
    return [float("nan") if rank[0] == 1 else 1.0] * len(completions)

def short_on_rank_1(completions, rank):
    return [1.0] * (len(completions) - rank[0])
"""


def completion(text: str = "", tokens: Sequence[int] = (3, 4, 5), number: int = 0, **columns: Any) -> Completion:
    ids = np.array(tokens, dtype=np.int32)
    return Completion("What?", text, np.array([1, 2], dtype=np.int32), ids, True, columns, number)


def three(**columns: Any) -> list[Completion]:
    return [completion(f"#### {n}", range(n), 10 + n, answer="2", **columns) for n in (1, 2, 3)]


def write_functions(folder: Path) -> Path:
    (folder / "helper.py").write_text("NUMBER = 7.0\n")
    path = folder / "reward.py"
    path.write_text(FUNCTIONS)
    return path


def of_function(path: Path, function: str, **settings: Any) -> RewardConfig:
    return reward(name="mine", python={"path": str(path), "function": function}, **settings)


def reward(**settings: Any) -> RewardConfig:
    return RewardConfig.model_validate({"timeout_seconds": 20.0, **settings})


def alone(verdict: Any) -> list[Any]:
    """What one rank gathers."""
    return [verdict]


def scored(config: RewardConfig, completions: Sequence[Completion]) -> Any:
    """The one call of a set of one reward."""
    rewards = RewardSet([config], alone)
    try:
        return rewards.score(completions)
    finally:
        rewards.close()
