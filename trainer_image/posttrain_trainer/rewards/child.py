"""The process that scores for one reward of one rank: loads what it scores with, then answers call after call.

Started by workers.py as `python -m posttrain_trainer.rewards.child <socket>`, never forked: a rank has threads of torch
and CUDA. What a user's code does here (print, leave, crash, hang, take memory) ends this process at most. Rules run in
the main thread, because their time limits are signals.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from posttrain_trainer.linux import die_with_parent
from posttrain_trainer.rewards import rules
from posttrain_trainer.rewards.calls import Call, Ready, Reply, Task, Unusable, receive, send
from posttrain_trainer.rewards.rules import Score, Unloadable


def _math(column: str) -> Score:
    from posttrain_trainer.rewards.mathematics import same_answer  # a second, which only this kind shall cost

    return same_answer(column)


def _python(path: str, function: str) -> Score:
    from posttrain_trainer.rewards.python import load

    return load(Path(path), function)


def _http(url: str, secret_path: str | None) -> Score:
    from posttrain_trainer.rewards.http import post

    return post(url, secret_path)


KINDS: Mapping[str, Callable[..., Score]] = {
    "math": _math,
    "exact_match": rules.exact_match,
    "format": lambda pattern: rules.matches(pattern, whole=True),
    "regex": lambda pattern: rules.matches(pattern, whole=False),
    "python": _python,
    "http": _http,
}
"""By field of RewardConfig: makes the function that scores a batch."""


def main() -> None:
    """The process."""
    die_with_parent(signal.SIGKILL)
    first_to_go()
    number, parent = (int(argument) for argument in sys.argv[1:])
    if os.getppid() != parent:  # the rank was gone before the line above
        return
    channel = socket.socket(fileno=number)
    channel.set_inheritable(False)
    task: Task = receive(channel)
    try:
        score = KINDS[task.kind](**task.arguments)
    except Unloadable as error:
        send(channel, Unusable(str(error)))
        return
    send(channel, Ready())
    while (call := receive(channel)) is not None:
        send(channel, answer(score, call))


def answer(score: Score, call: Call) -> Reply:
    """The reply to one call; whatever the function raises is part of it."""
    try:
        return score(call.batch, call.seconds)
    except BaseException as error:  # noqa: BLE001 - SystemExit too: this is where a user's function ends
        return Reply(failure=f"raised {type(error).__name__}: {str(error)[:300]}")
    finally:
        flush()


def flush() -> None:
    """What a function printed is on its way before the reply."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # a user's code closed or replaced it: there is nothing to flush
            continue


def first_to_go() -> None:
    """Where memory is short the kernel ends this process before the rank."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:  # a sandbox without it: the limit of workers.py is left
        return


if __name__ == "__main__":
    main()
