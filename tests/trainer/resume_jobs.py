"""What forked ranks run in the tests of resume and of the best checkpoint. A module of its own: forked ranks import it,
and it imports nothing that the fork server has not.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import checkpoint_files as files_module
from posttrain_trainer import engine as engine_module
from posttrain_trainer import export as export_module
from posttrain_trainer import runtime as runtime_module
from posttrain_trainer import worker as worker_module
from posttrain_trainer.evaluate import Evaluator
from posttrain_trainer.loop import Loop
from posttrain_trainer.record import End, failed, write_end
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.worker import Worker

Values = dict[int, float]
"""Step → what the evaluation after it is said to give as eval_loss."""


def attempt(number: int, folders: Sequence[str]) -> None:
    """Runs the worker of each job in one process group, one after the other, and writes their end records."""
    logging.basicConfig(level=logging.INFO)
    engine_module.PERSISTENCE_THRESHOLD = 0
    os.environ["POSTTRAIN_ATTEMPT"] = str(number)
    kept: list[Runtime] = []

    def start(topology: Any, seed: int) -> Runtime:
        if not kept:
            kept.append(runtime_module.start(topology, seed))
        runtime_module.seed_all(seed + kept[0].rank)
        return kept[0]

    worker_module.start = start
    for folder in folders:
        config = TrainerConfig.model_validate_json((Path(folder) / "config.json").read_text())
        write_end(config.work_dir, _end(Worker(config)))
        gc.collect()


def _end(worker: Worker) -> End:
    try:
        return worker.run()
    except Exception as error:  # noqa: BLE001  as in the worker's main
        return failed(int(os.environ["RANK"]), error, worker.step)


def scripted(values: Values, job: Callable[..., None], *arguments: Any) -> None:
    """A job whose evaluations give these numbers; steps that are not named give what they give."""
    step, evaluate, run = [0], Loop._evaluate, Evaluator.run

    def evaluate_at(loop: Loop) -> bool:
        step[0] = loop.state.step
        return evaluate(loop)

    def run_and_say(evaluator: Evaluator, engine: Any, stopping: Any) -> Any:
        found = run(evaluator, engine, stopping)
        return found if found is None or step[0] not in values else {**found, "eval_loss": values[step[0]]}

    Loop._evaluate = evaluate_at  # type: ignore[method-assign]
    Evaluator.run = run_and_say  # type: ignore[method-assign]
    job(*arguments)


def killed_at(owner: Any, name: str, due: Callable[..., bool], before: bool = True) -> None:
    """Makes rank 0 die by signal 9 in the first call of `owner.name` that is due: before or after its work."""
    original = getattr(owner, name)

    def work_and_die(*given: Any, **named: Any) -> Any:
        now = os.environ["RANK"] == "0" and due(*given, **named)
        result = None if now and before else original(*given, **named)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, work_and_die)


def die_in_removal(step: int, folders: Sequence[str]) -> None:
    """Killed with the folder of `step` half removed."""

    def due(path: Any, **_: Any) -> bool:
        found = Path(path).name == f"step-{step:06d}"
        if found:
            (Path(path) / "trainer.json").unlink()
        return found

    killed_at(files_module.shutil, "rmtree", due)
    attempt(1, folders)


def die_in_export(place: str, folders: Sequence[str]) -> None:
    """Killed between `output` and `best`, or inside the export of `best` before or after it takes its name."""
    if place == "between":
        killed_at(worker_module, "export_best", lambda *_: True)
    else:
        is_best = lambda path, *_: Path(path).name.startswith("best.")  # noqa: E731
        killed_at(export_module, "put_in_place", is_best, before=place == "before the rename")
    attempt(1, folders)


def overtaken_before_best(folders: Sequence[str]) -> None:
    """A newer attempt begins between `output` and `best`."""
    _before_best(lambda run_dir: (run_dir / "attempt.json").write_text('{"attempt": 3}'))
    attempt(1, folders)


def damaged_before_best(step: int, folders: Sequence[str]) -> None:
    """The checkpoint of `step` loses a file between `output` and `best`."""
    _before_best(lambda run_dir: (run_dir / "checkpoints" / f"step-{step:06d}" / "trainer.json").unlink())
    attempt(1, folders)


def _before_best(what: Callable[[Path], Any]) -> None:
    original = worker_module.export_best

    def happen_and_go_on(job: Any, *given: Any) -> None:
        what(Path(job.config.run_dir))
        original(job, *given)

    worker_module.export_best = happen_and_go_on
