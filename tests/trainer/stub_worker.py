"""A rank for tests of the launcher: does what $STUB says for it, without torch. Started by torchrun as a module.

$STUB is JSON {rank: [action, …]}; an action is a word or [word, value].
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from posttrain_api.names import ENV_CONFIG
from posttrain_api.reasons import Reason
from posttrain_api.records import Output, Report, Success
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import signs
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.record import failed, preempted, succeeded, write_end

RANK = int(os.environ["RANK"])
CONFIG = TrainerConfig.model_validate_json(Path(os.environ[ENV_CONFIG]).read_text())
STOP = False


def on_term(number: int, frame: object) -> None:
    global STOP
    STOP = True


def leave(end: object) -> None:
    write_end(CONFIG.work_dir, end)
    sys.stdout.flush()
    os._exit(end.exit_code)


def wait_in_a_collective() -> None:
    """Rank 0 waits for the others, who never come."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    signs.begin()
    if RANK == 0:
        Path(CONFIG.run_dir, "waiting-0").write_text(str(os.getpid()))
        dist.all_reduce(torch.zeros(1))


def wait() -> None:
    Path(CONFIG.run_dir, f"waiting-{RANK}").write_text(str(os.getpid()))
    while not STOP:
        time.sleep(0.05)


def go_on() -> None:
    """As `wait`, and the loop gets on meanwhile."""
    Path(CONFIG.run_dir, f"waiting-{RANK}").write_text(str(os.getpid()))
    while not STOP:
        signs.mark()
        time.sleep(0.05)


def environment() -> None:
    Path(CONFIG.run_dir, f"environment-{RANK}.json").write_text(json.dumps(dict(os.environ)))


def succeed() -> None:
    output = Output(uri="pvc://runs/job/uid/output", digest="sha256:0", format="safetensors", size_bytes=1)
    leave(succeeded(RANK, 7, Success(output=output, step=7, metrics={"loss": 1.5}) if RANK == 0 else None))


def report(step: int) -> None:
    signs.ReportFile.from_env(os.environ).report(Report(phase="Training", step=step, total_steps=9))


ACTIONS = {
    "begin": signs.begin,
    "collective": wait_in_a_collective,
    "environment": environment,
    "exit": os._exit,
    "fail": lambda reason: leave(failed(RANK, TrainerFailure(Reason(reason), f"because {reason}"), step=3)),
    "go on": go_on,
    "ignore": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "kill": lambda number: os.kill(os.getpid(), number),
    "report": report,
    "save": lambda: leave(preempted(RANK, "saved at step 5", 5)),
    "say": lambda text: print(text, flush=True),
    "sleep": time.sleep,
    "succeed": succeed,
    "wait": wait,
}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, on_term)
    signs.answer_dumps(RANK)
    for action in json.loads(os.environ["STUB"])[str(RANK)]:
        word, *values = action if isinstance(action, list) else [action]
        ACTIONS[word](*values)
