"""One rank: configuration → runtime → data → model → engine → loop → export → end record.

Started by torchrun as `python -m posttrain_trainer.worker`; `prepare` has left its manifest on storage by then.
Whatever happens, the last thing a rank does is to write its end record and to leave with `os._exit`: interpreter
shutdown aborts in a broken process group.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from posttrain_api.names import COMPLETIONS_FILE, METRICS_FILE, PREPARED_DIR
from posttrain_api.reasons import Reason
from posttrain_api.records import Output, Resolved, Success
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.assemble import assemble, course_of
from posttrain_trainer.best_export import export_best
from posttrain_trainer.console import Console
from posttrain_trainer.environment import load_config
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.export import Finished, export
from posttrain_trainer.job import Job, Outside
from posttrain_trainer.loop import Loop, Parts
from posttrain_trainer.metrics import MetricsFile, StepLines, finite
from posttrain_trainer.prepared import Prepared, read_manifest
from posttrain_trainer.prometheus import MetricsExporter
from posttrain_trainer.record import End, failed, preempted, succeeded, write_end
from posttrain_trainer.runtime import Runtime, start
from posttrain_trainer.signs import ReportFile, answer_dumps

log = logging.getLogger(__name__)


class Worker:
    """What a rank does, and how far it has come: `step` is in its end record whatever ends it."""

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config
        self._loop: Loop | None = None

    @property
    def step(self) -> int | None:
        """Optimizer steps done; None before the loop."""
        return None if self._loop is None else self._loop.state.step

    def run(self) -> End:
        """The end record of a rank that was not ended by an exception."""
        config = self._config
        prepared = _prepared(config)
        runtime = start(config.topology, config.training.seed)
        with ExitStack() as stack:
            outside = _outside(prepared, stack) if runtime.first else Outside()
            job = Job(config, prepared, runtime)
            parts, resolved = assemble(job, outside)
            stack.callback(parts.feed.close)
            return self._train(job, parts, resolved)

    def _train(self, job: Job, parts: Parts, resolved: Resolved) -> End:
        prepared, runtime = job.prepared, job.runtime
        parts.recorder.facts(prepared.data_report, resolved)
        self._loop = loop = self._ready(parts, resolved, runtime)
        finished = loop.run()
        parts.recorder.close()
        if not finished:
            return preempted(runtime.rank, f"stopped by a signal after step {loop.state.step}", loop.state.step)
        output = self._export(parts, prepared, runtime)
        if loop.state.best is not None:
            export_best(job, parts, loop.state.best, loop.state.step)
        parts.recorder.phase("Done")
        success = None if output is None else self._success(output, parts, resolved, prepared)
        runtime.control.barrier()  # no rank leaves before the output is there
        return succeeded(runtime.rank, loop.state.step, success)

    def _ready(self, parts: Parts, resolved: Resolved, runtime: Runtime) -> Loop:
        state = parts.checkpoints.resume(parts.saved)
        if state.step > resolved.total_steps:
            raise TrainerFailure(
                Reason.CHECKPOINT_INCOMPATIBLE,
                f"The checkpoint is at step {state.step}, this job ends at step {resolved.total_steps}. "
                "Raise training.maxSteps or epochs.",
            )
        course = course_of(self._config, resolved)
        loop = Loop(parts, course, runtime, state)
        if runtime.first:
            self._open_files(parts, loop)
        if parts.checkpoints.last is not None:
            parts.recorder.checkpoint(parts.checkpoints.last, state.best)
        return loop

    def _open_files(self, parts: Parts, loop: Loop) -> None:
        run_dir, steps = Path(self._config.run_dir), loop.lines_written
        samples = StepLines(run_dir / COMPLETIONS_FILE, loop.state.step) if self._config.stage == "RL" else None
        parts.recorder.open(MetricsFile(run_dir / METRICS_FILE, steps), samples)

    def _export(self, parts: Parts, prepared: Prepared, runtime: Runtime) -> Output | None:
        parts.recorder.phase("Exporting")
        weights = parts.engine.weights()
        if weights is None or not runtime.first:
            return None
        return export(
            self._config, prepared, Finished(parts.engine.module, weights, self.step or 0, parts.checkpoints.fence)
        )

    def _success(self, output: Output, parts: Parts, resolved: Resolved, prepared: Prepared) -> Success:
        assert self._loop is not None
        return Success(
            output=output,
            step=self._loop.state.step,
            metrics=finite(self._loop.state.metrics or {}),
            checkpoint=parts.checkpoints.last,
            best=self._loop.state.best,
            data_report=prepared.data_report,
            resolved=resolved,
        )


def _prepared(config: TrainerConfig) -> Prepared:
    folder = Path(config.run_dir) / PREPARED_DIR
    prepared = read_manifest(folder)
    if prepared is None:
        raise TrainerFailure(Reason.DATASET_NOT_FOUND, f"{folder}: no manifest. Run prepare first.")
    if prepared.config_digest != config.digest():
        raise TrainerFailure(
            Reason.CHECKPOINT_INCOMPATIBLE,
            f"{folder}: prepared for configuration {prepared.config_digest}, this job's is {config.digest()}. "
            "Run the job anew.",
        )
    return prepared


def _outside(prepared: Prepared, stack: ExitStack) -> Outside:
    """The sinks of rank 0; `stack` closes them, after a failure too."""
    console = Console(prepared.resolved.total_steps)
    reports = ReportFile.from_env(os.environ)
    exporter = MetricsExporter.from_env(os.environ)
    for sink in (console, reports, exporter):
        stack.callback(sink.close)
    return Outside(sinks=(console, reports, exporter), observers=(exporter,))


def main() -> NoReturn:
    """Never returns: leaves with the exit code of the end record."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    rank = int(os.environ["RANK"])
    answer_dumps(rank)
    config = load_config(os.environ)
    worker = Worker(config)
    try:
        end = worker.run()
    except Exception as error:
        log.exception("rank %d failed", rank)
        end = failed(rank, error, worker.step)
    write_end(config.work_dir, end)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.exit_code)


if __name__ == "__main__":
    main()
