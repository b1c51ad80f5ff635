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
from posttrain_api.records import Output, Success
from posttrain_api.trainer import TrainerConfig
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


def act(word: str, value: object) -> None:
    if word == "say":
        print(value, flush=True)
    elif word == "environment":
        Path(CONFIG.run_dir, f"environment-{RANK}.json").write_text(json.dumps(dict(os.environ)))
    elif word == "sleep":
        time.sleep(value)
    elif word == "wait":
        Path(CONFIG.run_dir, f"waiting-{RANK}").write_text(str(os.getpid()))
        while not STOP:
            time.sleep(0.05)
    elif word == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif word == "save":
        leave(preempted(RANK, "saved at step 5", 5))
    elif word == "fail":
        leave(failed(RANK, TrainerFailure(Reason(value), f"because {value}"), step=3))
    elif word == "kill":
        os.kill(os.getpid(), value)
    elif word == "exit":
        os._exit(value)
    elif word == "succeed":
        output = Output(uri="pvc://runs/job/uid/output", digest="sha256:0", format="safetensors", size_bytes=1)
        leave(succeeded(RANK, 7, Success(output=output, step=7, metrics={"loss": 1.5}) if RANK == 0 else None))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, on_term)
    for action in json.loads(os.environ["STUB"])[str(RANK)]:
        act(*(action if isinstance(action, list) else (action, None)))
