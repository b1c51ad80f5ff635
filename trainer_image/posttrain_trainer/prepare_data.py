"""The data half of `prepare`: from sources to token sets, with their report; in stage RL the rewards are tried on them.

Called by `prepare`. All files are listed and all schemas checked before anything is tokenised; a token set comes from
the claim's cache where an earlier job has made the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from posttrain_api.reasons import Reason
from posttrain_api.trainer import DataConfig, DataSource, TrainerConfig
from posttrain_trainer import preflight
from posttrain_trainer.data import build, inventory
from posttrain_trainer.data.messages import RowRefused
from posttrain_trainer.data.readers import DataFile, Row, list_files
from posttrain_trainer.data.rows import Text, parse_row
from posttrain_trainer.data.schema import LossOn
from posttrain_trainer.data.tokenise import Tokeniser
from posttrain_trainer.data.vocabulary import Vocabulary
from posttrain_trainer.errors import readable
from posttrain_trainer.fetch import Fetcher
from posttrain_trainer.lengths import settle
from posttrain_trainer.mixture import epoch_rows, parts_of
from posttrain_trainer.model_files import folder_digest
from posttrain_trainer.model_start import StartModel
from posttrain_trainer.prepare_paths import Paths
from posttrain_trainer.prompts import PromptSet
from posttrain_trainer.resolve import rows_per_step
from posttrain_trainer.reward_trial import try_rewards
from posttrain_trainer.stops import generation_config_of, stops
from posttrain_trainer.token_cache import TokenCache, root_of, source_facts

_log = logging.getLogger("posttrain.prepare")


@dataclass(frozen=True)
class Opened:
    """The files of train and eval, with what their rows are."""

    train: build.Sources
    evaluation: build.Sources


@dataclass(frozen=True)
class Sets:
    """The token sets `attempt/train` and `attempt/eval` (None: there is none). `rows`: of an epoch; `stops`: tokens
    that end a completion, in stage RL."""

    train: build.Built
    evaluation: build.Built | None
    rows: int
    stops: tuple[int, ...] = ()


def open_sources(config: TrainerConfig, paths: Paths) -> Opened:
    """DatasetNotFound and DatasetSchemaInvalid, with the source; also where a file of the first attempt is gone."""
    opened = Opened(_open(config, config.data.train, "train", paths), _open(config, config.data.eval, "eval", paths))
    listed = {
        f"data.{role}[{index}] {one.source.uri}": [file.name for file in one.files]
        for role, sources in (("train", opened.train), ("eval", opened.evaluation))
        for index, (one, _) in enumerate(sources)
    }
    inventory.check(paths.files, listed)
    return opened


def _open(config: TrainerConfig, sources: tuple[DataSource, ...], role: str, paths: Paths) -> build.Sources:
    opened = []
    for source in sources:
        one = build.OpenSource(source, tuple(_files(source, role, paths)))
        opened.append((one, build.schema_of(one, config)))
    return opened


def _files(source: DataSource, role: str, paths: Paths) -> list[DataFile]:
    fetched = Fetcher(paths.hub).fetch(source, "dataset")
    if not source.uri.startswith("hf://"):
        with readable(Reason.DATASET_NOT_FOUND, source.uri):
            return list_files(fetched.path, source.uri, source.format)
    # Imported here: `datasets` takes seconds to load, and mounted data do not need it.
    from posttrain_trainer.data.hub_files import hub_files

    return hub_files(fetched.path, source, role, paths.cache)


def texts(sources: build.Sources) -> Iterator[str]:
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


def token_sets(config: TrainerConfig, paths: Paths, opened: Opened, model: StartModel) -> Sets:
    """Writes tokenizer, token sets and preflight report to the attempt's folder, the report to the log too."""
    # An answer is compared, or its tokens are: the prompt of a pair is never counted.
    loss_on: LossOn = config.data.loss_on if config.stage in ("Pretrain", "SFT") else "Completion"
    sources = [*opened.train, *opened.evaluation]
    vocabulary = _vocabulary(model, sources, loss_on)
    ends = _stops(config, model, _chat(sources))
    model.tokenizer.save_pretrained(paths.attempt / "tokenizer")
    data, limits = settle(config, model.positions)
    tokeniser = Tokeniser(vocabulary, limits, loss_on)
    cache = TokenCache(root_of(config))

    def one(role: str, sources: build.Sources) -> build.Built:
        folder = paths.attempt / role
        facts = partial(_facts, config.stage, data, sources, paths)
        return cache.get(folder, facts, lambda: build.build(folder, role, sources, data, tokeniser))

    train = one("train", opened.train)
    shown = preflight.report(train.samples, vocabulary, _chat(opened.train), ends)
    (paths.attempt / "preflight.txt").write_text(shown + "\n")
    _log.info("the first rows as the model will see them:\n%s", shown)
    evaluation = one("eval", opened.evaluation) if opened.evaluation else None
    _try_rewards(config, paths, model)
    return Sets(train, evaluation, _epoch_rows(config, train), ends)


def _facts(stage: str, data: DataConfig, sources: build.Sources, paths: Paths) -> dict[str, object]:
    """What the tokens of a set depend on. What may be refused is among it: a set in the cache has been judged."""
    return {
        "stage": stage,
        "data": data.model_dump(mode="json", exclude={"train", "eval"}),
        "tokenizer": folder_digest(paths.attempt / "tokenizer"),
        "sources": [source_facts(opened, schema) for opened, schema in sources],
    }


def _vocabulary(model: StartModel, sources: build.Sources, loss_on: LossOn) -> Vocabulary:
    vocabulary = Vocabulary(model.tokenizer, model.where)
    if _chat(sources):
        vocabulary.require_chat()
        if loss_on == "Assistant":
            vocabulary.require_markers()
    return vocabulary


def _chat(sources: build.Sources) -> bool:
    return any(schema is not None and schema.chat for _, schema in sources)


def _try_rewards(config: TrainerConfig, paths: Paths, model: StartModel) -> None:
    if config.stage != "RL":
        return
    folders = [paths.attempt / role for role, given in (("train", True), ("eval", config.data.eval)) if given]
    tried = try_rewards(config.rewards, [PromptSet(folder) for folder in folders], model.tokenizer)
    with (paths.attempt / "preflight.txt").open("a") as shown:
        shown.writelines(line + "\n" for line in tried)


def _stops(config: TrainerConfig, model: StartModel, chat: bool) -> tuple[int, ...]:
    if config.stage != "RL":
        return ()
    generation = generation_config_of(model.folder, model.where, config.model.trust_remote_code)
    return stops(model.tokenizer, generation, chat)


def _epoch_rows(config: TrainerConfig, train: build.Built) -> int:
    rows = epoch_rows(parts_of(config.data.train, train.sources))
    field, batch = "rollout.batchSize" if config.stage == "RL" else "training.batchSize", rows_per_step(config)
    if rows < batch:
        _log.warning("an epoch has %d rows, %s is %d: a step has rows of several epochs", rows, field, batch)
    return rows
