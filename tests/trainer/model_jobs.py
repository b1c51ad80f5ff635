"""What forked ranks run in the tests of models, adapters and engines: many jobs in one process group."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from trainer_jobs import Lines, sgd

from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import engine as engine_module
from posttrain_trainer import packing as packing_module
from posttrain_trainer import runtime as runtime_module
from posttrain_trainer.assemble import assemble, course_of
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.export import Finished, export
from posttrain_trainer.job import Job, Outside
from posttrain_trainer.loop import Loop, Parts
from posttrain_trainer.microbatch import collate
from posttrain_trainer.prepared import read_manifest
from posttrain_trainer.state import State
from posttrain_trainer.tokenset import TokenSet


def export_all(folders: list[str], probe: str, plain: bool = False) -> None:
    """Trains and exports the job of each folder. Rank 0 keeps there what each step measured (lines.json), the learning
    weights (weights.pt), the parameter counts (counts.json), and what the trained module says of the rows in `probe`
    (probe.pt); in bf16 the fp32 masters too (masters.pt). `plain`: SGD, but AdamW for a job called adam-something. A
    job that fails keeps its message (failed.txt) and the next one runs."""
    engine_module.PERSISTENCE_THRESHOLD = 0
    runtime = None
    for name in folders:
        folder = Path(name)
        config = TrainerConfig.model_validate_json((folder / "config.json").read_text())
        runtime = runtime or runtime_module.start(config.topology, config.training.seed)
        packing_module.PACKED = False if (folder / "padded").exists() else None
        try:
            optimizer = sgd if plain and not folder.name.startswith("adam") else None
            _export_one(config, folder, runtime, Path(probe) if probe else None, optimizer)
        except TrainerFailure as failure:
            (folder / "failed.txt").write_text(f"{failure.reason}: {failure.message}")
        gc.collect()
    assert runtime is not None
    runtime.control.barrier()


def _export_one(config: TrainerConfig, folder: Path, runtime: Any, probe: Path | None, optimizer: Any) -> None:
    prepared = read_manifest(folder / "prepared")
    assert prepared is not None
    lines = Lines()
    outside = Outside(observers=[lines]) if runtime.first else Outside()
    parts, resolved = assemble(Job(config, prepared, runtime), outside, optimizer)
    assert Loop(parts, course_of(config, resolved), runtime, State()).run()
    said = None if probe is None else _said(parts, probe)
    masters = _masters(parts) if config.training.precision == "BF16" else None
    weights = parts.engine.weights()
    if not runtime.first:
        return
    assert weights is not None
    torch.save(said, folder / "probe.pt")
    torch.save(weights, folder / "weights.pt")
    torch.save(masters, folder / "masters.pt")
    (folder / "lines.json").write_text(json.dumps(lines.lines))
    counts: dict[str, Any] = {"parameters": resolved.parameters, "trainable": resolved.trainable_parameters}
    counts["settings"] = asdict(parts.engine.settings)
    (folder / "counts.json").write_text(json.dumps(counts))
    export(config, prepared, Finished(parts.engine.module, weights, resolved.total_steps, parts.checkpoints.fence))


@torch.no_grad()
def _said(parts: Parts, probe: Path) -> torch.Tensor:
    """The scores, or the log-probabilities, of all rows at once."""
    tokens = TokenSet(probe)
    parts.engine.train(False)
    rows = [tokens[row] for row in range(len(tokens))]
    micro = collate(rows, whole=parts.algorithm.needs == "score", packed=True)
    out = parts.engine.forward(micro)
    return out if parts.algorithm.needs == "score" else out[0]


def _masters(parts: Parts) -> dict[str, torch.Tensor]:
    """The fp32 weights that the optimizer keeps, whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    learning = [(name, each) for name, each in parts.engine.module.named_parameters() if each.requires_grad]
    return {name: safe_get_full_fp32_param(each).detach().clone() for name, each in learning}
