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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain_api.names import PREPARED_DIR
from posttrain_api.trainer import DataConfig, DataSource, TrainerConfig
from posttrain_trainer import preflight
from posttrain_trainer.data import build
from posttrain_trainer.data.fit import Limits
from posttrain_trainer.data.messages import RowRefused
from posttrain_trainer.data.readers import Row, list_files
from posttrain_trainer.data.rows import Text, parse_row
from posttrain_trainer.data.schema import LossOn
from posttrain_trainer.data.tokenise import Tokeniser
from posttrain_trainer.data.vocabulary import Vocabulary
from posttrain_trainer.environment import load_config
from posttrain_trainer.fence import Fence
from posttrain_trainer.fetch import Fetcher
from posttrain_trainer.mixture import epoch_rows, parts_of
from posttrain_trainer.model_start import StartModel, reference_model, scratch_model, starting_model
from posttrain_trainer.prepared import MANIFEST, Prepared, read_manifest, write_manifest
from posttrain_trainer.record import ENV_ATTEMPT, PREPARE, failed, write_end
from posttrain_trainer.resolve import Facts, resolve

_log = logging.getLogger("posttrain.prepare")


@dataclass(frozen=True)
class Paths:
    """Where this attempt of prepare writes. `hub` is shared by attempts: a download goes on where it stopped."""

    root: Path
    attempt: Path
    hub: Path
    cache: Path

    @classmethod
    def of(cls, config: TrainerConfig, attempt: str) -> Paths:
        """The folders of a config."""
        root = Path(config.run_dir) / PREPARED_DIR
        return cls(root, root / f"attempt-{attempt}", root / "hub", Path(config.work_dir) / "datasets")


def main() -> int:
    """0 when the manifest is there; else the exit code of the reason, which the end record says in full."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    # A line per request would drown ours.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = load_config(os.environ)
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
    fetcher = Fetcher(paths.hub, config.model.trust_remote_code)
    train = _open(config, config.data.train, "train", paths)
    evaluation = _open(config, config.data.eval, "eval", paths)
    model = _model(config, paths, fetcher, train)
    reference = reference_model(config, fetcher, model)
    loss_on = config.data.loss_on if config.stage in ("Pretrain", "SFT") else "Completion"
    vocabulary = _vocabulary(model, [*train, *evaluation], loss_on)
    data = _within_positions(config.data, model.positions)
    tokeniser = Tokeniser(vocabulary, Limits(data.max_length, data.too_long, data.max_prompt_length), loss_on)
    built = build.build(paths.attempt / "train", "train", train, data, tokeniser)
    shown = preflight.report(built.samples, vocabulary, _chat(train))
    (paths.attempt / "preflight.txt").write_text(shown + "\n")
    _log.info("the first rows as the model will see them:\n%s", shown)
    held_out = build.build(paths.attempt / "eval", "eval", evaluation, data, tokeniser) if evaluation else None
    rows = _epoch_rows(config, built)
    model.tokenizer.save_pretrained(paths.attempt / "tokenizer")
    facts = Facts(rows, model.parameters, _accelerator_memory(config), model.revision)
    return Prepared(
        config_digest=digest,
        model_dir=str(model.folder),
        model_digest=model.digest,
        adapters=model.adapters,
        reference_dir=str(reference.folder) if reference else None,
        reference_digest=reference.digest if reference else None,
        reference_adapters=reference.adapters if reference else (),
        tokenizer_dir=str(paths.attempt / "tokenizer"),
        train_dir=str(paths.attempt / "train"),
        eval_dir=str(paths.attempt / "eval") if held_out else None,
        data_digest=build.digest_of(paths.attempt / "train"),
        data_report=built.report,
        eval_report=held_out.report if held_out else None,
        resolved=resolve(config, facts),
    )


def _epoch_rows(config: TrainerConfig, built: build.Built) -> int:
    rows, batch = epoch_rows(parts_of(config.data.train, built.sources)), config.training.batch_size
    if rows < batch:
        _log.warning("an epoch has %d rows, training.batchSize is %d: a step has rows of several epochs", rows, batch)
    return rows


def _open(config: TrainerConfig, sources: tuple[DataSource, ...], role: str, paths: Paths) -> build.Sources:
    """The files of each source and its row kind: all paths and schemas are checked before anything is tokenised."""
    fetcher = Fetcher(paths.hub)
    opened = []
    for source in sources:
        fetched = fetcher.fetch(source, "dataset")
        if not source.uri.startswith("hf://"):
            files = list_files(fetched.path, source.uri, source.format)
        else:
            # Imported here: `datasets` takes seconds to load, and mounted data do not need it.
            from posttrain_trainer.data.hub_files import hub_files

            files = hub_files(fetched.path, source, role, paths.cache)
        one = build.OpenSource(source, tuple(files))
        opened.append((one, build.schema_of(one, config)))
    return opened


def _model(config: TrainerConfig, paths: Paths, fetcher: Fetcher, train: build.Sources) -> StartModel:
    scratch = config.model.scratch
    if scratch is None:
        return starting_model(config, fetcher)
    return scratch_model(scratch, paths.attempt / "model", fetcher, lambda: _texts(train))


def _texts(sources: build.Sources) -> Iterator[str]:
    """All strings that a tokenizer should know; refused rows are counted when the rows are tokenised."""
    for opened, schema in sources:
        for record in opened.records():
            if schema is None or not isinstance(record, Row):
                continue
            try:
                row = parse_row(record.values, schema.kind, schema.mapping, "All")
            except RowRefused:
                continue
            if isinstance(row, Text):
                yield row.text


def _vocabulary(model: StartModel, sources: build.Sources, loss_on: LossOn) -> Vocabulary:
    vocabulary = Vocabulary(model.tokenizer, model.where)
    if _chat(sources):
        vocabulary.require_chat()
        if loss_on == "Assistant":
            vocabulary.require_markers()
    return vocabulary


def _chat(sources: build.Sources) -> bool:
    return any(schema is not None and schema.chat for _, schema in sources)


def _within_positions(data: DataConfig, positions: int | None) -> DataConfig:
    """With the limit that holds: a model has no use for tokens past its last position."""
    if positions is None or positions >= data.max_length:
        return data
    _log.warning("data.maxLength is %d, the model has %d positions: those are the limit", data.max_length, positions)
    return data.model_copy(update={"max_length": positions})


def _accelerator_memory(config: TrainerConfig) -> int | None:
    """Bytes of one accelerator; None for a CPU job."""
    if config.topology.gpus_per_node == 0 or not torch.cuda.is_available():
        return None
    memory: int = torch.cuda.get_device_properties(0).total_memory
    return memory


if __name__ == "__main__":
    sys.exit(main())
