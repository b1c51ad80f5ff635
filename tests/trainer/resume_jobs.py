"""What forked ranks run in the tests of resume and of the best checkpoint. A module of its own: forked ranks import it,
and it imports nothing that the fork server has not.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trainer_jobs

from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import checkpoint_files as files_module
from posttrain_trainer import engine as engine_module
from posttrain_trainer import export as export_module
from posttrain_trainer import runtime as runtime_module
from posttrain_trainer import worker as worker_module
from posttrain_trainer.checkpoint_files import committed, damaged
from posttrain_trainer.engine import Engine
from posttrain_trainer.evaluate import Evaluator
from posttrain_trainer.loop import Loop
from posttrain_trainer.record import End, clear_ends, failed, write_end
from posttrain_trainer.recorder import Recorder
from posttrain_trainer.rewards.reward_set import RewardSet
from posttrain_trainer.rollout.generate import Generate
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.worker import Worker

Values = dict[int, float]
"""Step → what the evaluation after it is said to give as eval_loss."""
_started: list[Runtime] = []


def attempt(number: int, folders: Sequence[str]) -> None:
    """Runs the worker of each job in one process group, one after the other, and writes their end records."""
    logging.basicConfig(level=logging.INFO)
    engine_module.PERSISTENCE_THRESHOLD = 0
    os.environ["POSTTRAIN_ATTEMPT"] = str(number)
    worker_module.start = _start_once
    for folder in folders:
        config = TrainerConfig.model_validate_json((Path(folder) / "config.json").read_text())
        clear_ends(config.work_dir, [int(os.environ["RANK"])])
        write_end(config.work_dir, _end(Worker(config)))
        gc.collect()


def _start_once(topology: Any, seed: int) -> Runtime:
    """One process group for all; each job begins with the generators of its own seed."""
    if not _started:
        _started.append(runtime_module.start(topology, seed))
    runtime_module.seed_all(seed + _started[0].rank)
    return _started[0]


def _end(worker: Worker) -> End:
    try:
        return worker.run()
    except Exception as error:  # noqa: BLE001  as in the worker's main
        return failed(int(os.environ["RANK"]), error, worker.step)


def scripted(values: Values, job: Callable[..., None], *arguments: Any) -> None:
    """A job whose evaluations give these numbers; steps that are not named give what they give."""
    now, run = _position(), Evaluator.run

    def run_and_say(evaluator: Evaluator, engine: Any, stopping: Any) -> Any:
        found = run(evaluator, engine, stopping)
        return found if found is None or now[0] not in values else {**found, "eval_loss": values[now[0]]}

    Evaluator.run = run_and_say  # type: ignore[method-assign]
    job(*arguments)


def killed_at(owner: Any, name: str, due: Callable[..., bool], before: bool = True, rank: int = 0) -> None:
    """Makes `rank` die by signal 9 in the first call of `owner.name` that is due: before or after its work."""
    original = getattr(owner, name)

    def work_and_die(*given: Any, **named: Any) -> Any:
        now = os.environ["RANK"] == str(rank) and due(*given, **named)
        result = None if now and before else original(*given, **named)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, work_and_die)


def killed(place: str, step: int, rank: int, folders: Sequence[str]) -> None:
    """A first attempt of which `rank` is killed at `place` of `step`: of its computation or of its save."""
    now = _position()
    temporary, final = f"step-{step:06d}.tmp-1", f"step-{step:06d}"

    def half_removed(path: Any, **_: Any) -> bool:
        if Path(path).name == final:
            (Path(path) / "trainer.json").unlink()
        return Path(path).name == final

    owner, name, due, before = {
        "forward": (Engine, "forward", lambda *_: now == [step, "training"], True),
        "rollout": (Generate, "generate", lambda *_: now == [step, "training"], True),
        "reward": (RewardSet, "score", lambda *_: now == [step, "training"], False),
        "optimizer": (Engine, "step", lambda *_: now == [step, "training"], True),
        "applied": (Engine, "step", lambda *_: now == [step, "training"], False),
        "line": (Recorder, "step", lambda _, done, __: done == step, False),
        "evaluation": (Engine, "forward", lambda *_: now == [step, "evaluation"], True),
        "DeepSpeed": (Engine, "save", lambda _, folder: folder.name == temporary, True),
        "manifest": (
            files_module,
            "write_json",
            lambda path, _: path.parts[-2:] == (temporary, "manifest.json"),
            False,
        ),
        "commit": (files_module, "commit", lambda path, *_: path.name == temporary, False),
        "removal": (files_module.shutil, "rmtree", half_removed, True),
    }[place]
    killed_at(owner, name, due, before, rank)
    attempt(1, folders)


def _position() -> list[Any]:
    """The step that is being computed, from 1, and whether it is trained or evaluated; kept up to date."""
    now: list[Any] = [0, ""]
    train, evaluate = Loop._train, Loop._evaluate

    def train_at(loop: Loop) -> bool:
        now[:] = [loop.state.step + 1, "training"]
        return train(loop)

    def evaluate_at(loop: Loop) -> bool:
        now[:] = [loop.state.step, "evaluation"]
        return evaluate(loop)

    Loop._train = train_at  # type: ignore[method-assign]
    Loop._evaluate = evaluate_at  # type: ignore[method-assign]
    return now


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


def full_at_export(place: str, room: int, result: str, folder: str) -> None:
    """A job on a tmpfs of its own that has `room` bytes left when `output` or `best` is to be written; then, with the
    room back, its next attempt. Keeps what either left."""
    copy = Path(result).with_name("copy")
    shutil.copytree(folder, copy)
    problem = trainer_jobs._mount_small(Path(folder), "16m")
    if problem is not None:
        Path(result).write_text(json.dumps({"skipped": problem}))
        return
    shutil.copytree(copy, folder, dirs_exist_ok=True)
    name = {"output": "export", "best": "export_best"}[place]
    original, filler = getattr(worker_module, name), Path(folder) / "filler"

    def fill_and_go_on(*given: Any) -> Any:
        free = os.statvfs(folder)
        filler.write_bytes(bytes(free.f_bavail * free.f_bsize - room))
        return original(*given)

    setattr(worker_module, name, fill_and_go_on)
    attempt(1, [folder])
    first = _found(Path(folder))
    filler.unlink()
    setattr(worker_module, name, original)
    attempt(2, [folder])
    Path(result).write_text(json.dumps({"first": first, "second": _found(Path(folder))}))


def _found(folder: Path) -> dict[str, Any]:
    whole = [
        entry.folder.name for entry in committed(folder / "checkpoints") if not damaged(entry, entry.manifest.files)
    ]
    names = sorted(path.name for path in folder.glob("*") if path.name.startswith(("output", "best")))
    end = json.loads((folder / "work" / "ends" / "rank-0.json").read_text())
    return {"end": end, "whole": whole, "exported": names}
