"""The best model of a finished training, as `<run_dir>/best`: the same files and manifest as `output`.

Called by the worker on all ranks, after `output` is there. An attempt that is killed before or inside it leaves
`output` whole and `best` whole or not there; the next one finds the training done and exports both anew.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from posttrain_api.names import BEST_DIR, OUTPUT_DIR
from posttrain_api.records import Best
from posttrain_trainer.export import Finished, export, put_in_place
from posttrain_trainer.fence import Fence
from posttrain_trainer.job import Job
from posttrain_trainer.loop import Parts


def export_best(job: Job, parts: Parts, best: Best, last_step: int) -> None:
    """Writes `best`. The engine holds the best checkpoint afterwards, no more the last.

    TrainerFailure(CheckpointIncompatible) where the best checkpoint is not whole, PeerLost where a newer attempt has
    taken over."""
    if best.step == last_step:
        if job.runtime.first:
            _link(Path(job.config.run_dir), parts.checkpoints.fence)
        return
    parts.checkpoints.load(parts.engine, best.step)
    weights = parts.engine.weights()
    if weights is not None and job.runtime.first:
        finished = Finished(parts.engine.module, weights, best.step, parts.checkpoints.fence, BEST_DIR)
        export(job.config, job.prepared, finished)


def _link(run_dir: Path, fence: Fence) -> None:
    """`output` once more, in hard links: both are written once and never changed."""
    for left in run_dir.glob(BEST_DIR + ".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)  # it costs space only
    temporary = run_dir / f"{BEST_DIR}.tmp-{fence.attempt}"
    shutil.copytree(run_dir / OUTPUT_DIR, temporary, copy_function=_link_or_copy)
    fence.check()
    put_in_place(temporary, run_dir / BEST_DIR)


def _link_or_copy(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:  # a storage without hard links
        shutil.copy2(source, target)
