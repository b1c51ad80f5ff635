"""`python -m posttrain_trainer.prepare`: fetch, tokenise and check everything before any rank starts.

Started by the launcher on node 0, in a process of its own (its memory is given back before training). It reads the
TrainerConfig, leaves `<run_dir>/prepared/manifest.json` and says why where it cannot. Done twice, the second time
does nothing. Each attempt writes below a folder of its own, and the manifest, renamed into place last, says which one
counts.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import nf4
from posttrain_trainer.environment import load_config
from posttrain_trainer.fence import Fence
from posttrain_trainer.fetch import Fetcher
from posttrain_trainer.model_start import StartModel, reference_model, scratch_model, starting_model
from posttrain_trainer.prepare_data import Opened, open_sources, texts, token_sets
from posttrain_trainer.prepare_paths import Paths
from posttrain_trainer.prepared import MANIFEST, Prepared, read_manifest, write_manifest
from posttrain_trainer.record import ENV_ATTEMPT, PREPARE, failed, write_end
from posttrain_trainer.resolve import Facts, resolve, second_reference
from posttrain_trainer.scoring_models import ScoringModels, scoring_models
from posttrain_trainer.signs import begin

_log = logging.getLogger("posttrain.prepare")


def main() -> int:
    """0 when the manifest is there; else the exit code of the reason, which the end record says in full."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # A line per request would drown ours.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = load_config(os.environ)
    begin()
    try:
        prepare(config)
    except Exception as error:  # noqa: BLE001  the top of the process: whatever it was is classified and recorded
        end = failed(PREPARE, error)
        _log.error("%s: %s", end.reason, end.message, exc_info=end.exit_code >= 128)
        write_end(config.work_dir, end)
        return end.exit_code
    return 0


def prepare(config: TrainerConfig) -> Prepared:
    """The manifest of this config: the one that is there, or a new one. TrainerFailure with the reason where it
    cannot be.
    """
    paths = Paths.of(config, os.environ.get(ENV_ATTEMPT, "0"))
    digest = config.digest()
    known = _known(paths.root)
    if known is not None and known.config_digest == digest:
        _log.info("already prepared: %s", paths.root)
        return known
    (paths.root / MANIFEST).unlink(missing_ok=True)
    if paths.attempt.exists():
        shutil.rmtree(paths.attempt)
    paths.attempt.mkdir(parents=True)
    prepared = _prepare(config, paths, digest)
    if ENV_ATTEMPT in os.environ:
        # A node that was cut off must not take the place of its successor's data, nor delete them.
        Fence(Path(config.run_dir), int(os.environ[ENV_ATTEMPT])).check()
    write_manifest(paths.root, prepared)
    _remove_others(paths)
    return prepared


def _known(root: Path) -> Prepared | None:
    try:
        return read_manifest(root)
    except ValueError:
        _log.warning("%s is of another release: preparing anew", root / MANIFEST)
        return None


def _remove_others(paths: Paths) -> None:
    for folder in paths.root.glob("attempt-*"):
        if folder != paths.attempt:
            shutil.rmtree(folder, ignore_errors=True)  # left by an attempt that was cut off; costs space only


def _prepare(config: TrainerConfig, paths: Paths, digest: str) -> Prepared:
    memory = _accelerator_memory(config)
    if nf4.asked(config):
        nf4.check("cpu" if memory is None else "cuda")
    fetcher = Fetcher(paths.hub, config.model.trust_remote_code)
    opened = open_sources(config, paths)
    model = _model(config, paths, fetcher, opened)
    reference = reference_model(config, fetcher, model)
    scoring = scoring_models(config, fetcher, model)
    sets = token_sets(config, paths, opened, _shortest(model, reference, *scoring.all))
    facts = Facts(sets.rows, model.parameters, memory, model.revision, **_others(config, model, reference, scoring))
    return Prepared(
        config_digest=digest,
        model_dir=str(model.folder),
        model_digest=model.digest,
        adapters=model.adapters,
        reference_dir=str(reference.folder) if reference else None,
        reference_digest=reference.digest if reference else None,
        reference_adapters=reference.adapters if reference else (),
        **scoring.manifest(),
        tokenizer_dir=str(paths.attempt / "tokenizer"),
        train_dir=str(paths.attempt / "train"),
        eval_dir=str(paths.attempt / "eval") if sets.evaluation else None,
        data_digest=sets.train.digest,
        stop_tokens=sets.stops,
        data_report=sets.train.report,
        eval_report=sets.evaluation.report if sets.evaluation else None,
        resolved=resolve(config, facts),
    )


def _model(config: TrainerConfig, paths: Paths, fetcher: Fetcher, opened: Opened) -> StartModel:
    scratch = config.model.scratch
    if scratch is None:
        return starting_model(config, fetcher)
    return scratch_model(scratch, paths.attempt / "model", fetcher, lambda: texts(opened.train))


def _shortest(model: StartModel, *others: StartModel | None) -> StartModel:
    """The model with the positions of whichever of all has the fewest: they read the same sequences."""
    found = [each.positions for each in (model, *others) if each is not None and each.positions is not None]
    return replace(model, positions=min(found, default=None))


def _others(
    config: TrainerConfig, model: StartModel, reference: StartModel | None, scoring: ScoringModels
) -> dict[str, int]:
    """Parameters of the models beside the one that is trained, as `Facts` names them. Roughly: what a model of a folder
    has counts once for each use of it."""
    frozen = sum(each.parameters for each in scoring.rewards.values())
    if second_reference(config):
        frozen += (reference or model).parameters
    critic = config.critic if config.algorithm == "PPO" else None
    own = 0 if critic is None or critic.shared else (scoring.critic or model).parameters
    return {"frozen": frozen, "critic": own}


def _accelerator_memory(config: TrainerConfig) -> int | None:
    """Bytes of one accelerator; None for a CPU job."""
    if config.topology.gpus_per_node == 0 or not torch.cuda.is_available():
        return None
    memory: int = torch.cuda.get_device_properties(0).total_memory
    return memory


if __name__ == "__main__":
    sys.exit(main())
