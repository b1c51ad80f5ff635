"""A data set, from its sources to a token set on storage, streaming.

Called by `prepare` for train and for eval. Files are read once; rows are tokenised in batches and written as they
come, so that memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain_api.records import DataReport
from posttrain_api.trainer import DataConfig, DataSource, TrainerConfig
from posttrain_trainer.data.columns import Columns, columns_of
from posttrain_trainer.data.fit import Encoded
from posttrain_trainer.data.messages import RowRefused
from posttrain_trainer.data.readers import Broken, DataFile, Place, Row, read
from posttrain_trainer.data.report import Tally, judge
from posttrain_trainer.data.rows import Parsed, Prompt, parse_row
from posttrain_trainer.data.schema import CHATS, MARGIN, Kind, allowed_kinds, choose_kind
from posttrain_trainer.data.tokenise import Tokeniser
from posttrain_trainer.progress import Progress
from posttrain_trainer.tokenset import TokenSetWriter, TrainingRow, set_files

PEEK_ROWS = 100
BATCH_ROWS = 256
SAMPLES = 3

_log = logging.getLogger("posttrain.prepare")


@dataclass(frozen=True)
class OpenSource:
    """A source with its files on this machine."""

    source: DataSource
    files: tuple[DataFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files; one that is gone has none, and is named when it is read."""
        return sum(file.path.stat().st_size for file in self.files if file.path.exists())

    def records(self) -> Iterator[Row | Broken]:
        """The rows of all files, at most maxRows."""
        rows = itertools.chain.from_iterable(read(file) for file in self.files)
        return itertools.islice(rows, self.source.max_rows)


@dataclass(frozen=True)
class Schema:
    """What rows a source has, and how its columns are called; `chat`: they go through the chat template; `columns`: of
    prompts, those that the rewards get."""

    kind: Kind
    mapping: dict[str, str]
    chat: bool = False
    columns: Columns | None = None

    @property
    def needed(self) -> list[str]:
        """Columns without which a row is refused, beside those of its kind."""
        return sorted(self.columns.needed) if self.columns is not None else []


Sources = Sequence[tuple[OpenSource, Schema | None]]


@dataclass(frozen=True)
class Sample:
    """One of the first rows, kept to be shown with its mask. `number`: its (first) training row in the set."""

    place: Place
    number: int
    row: TrainingRow


@dataclass(frozen=True)
class Built:
    """What became of the rows, training rows of each source, the first of them, and the digest of the set."""

    report: DataReport
    sources: tuple[int, ...]
    samples: tuple[Sample, ...]
    digest: str


def schema_of(opened: OpenSource, config: TrainerConfig) -> Schema | None:
    """The row kind, from the columns of the first rows; None where there is no readable row. DatasetSchemaInvalid."""
    peeked = [record for record in itertools.islice(opened.records(), PEEK_ROWS) if isinstance(record, Row)]
    columns = {name for record in peeked for name in record.values}
    if not columns:
        return None
    mapping = _mapping(opened.source, config)
    kind = choose_kind(opened.source.uri, columns, mapping, allowed_kinds(config.stage, config.data.loss_on))
    answer = mapping.get(_ANSWERS.get(kind, ""), _ANSWERS.get(kind, ""))
    lists = any(isinstance(record.values.get(answer), list) for record in peeked)
    given = None
    if kind is Kind.PROMPT:
        given = columns_of(mapping.get("prompt", "prompt"), config.rewards)
        given.check(opened.source.uri, [record.values for record in peeked])
        _tell_answers(opened.source.uri, [record.values.get(given.prompt) for record in peeked])
    return Schema(kind, mapping, lists or kind in CHATS, given)


def _tell_answers(uri: str, prompts: Sequence[Any]) -> None:
    """Says of the first prompts how many have an answer, which rows.py leaves out."""
    lasts = [prompt[-1] for prompt in prompts if isinstance(prompt, list) and prompt]
    answered = sum(isinstance(last, dict) and last.get("role") == "assistant" for last in lasts)
    if answered:
        _log.info("%s: %d of the first %d prompts end with an answer: it is left out", uri, answered, len(prompts))


_ANSWERS = {Kind.PAIR: "completion", Kind.COMPARISON: "chosen", Kind.PROMPT: "prompt"}
"""Kinds whose rows are strings or lists of messages, and the column that tells which."""


def _mapping(source: DataSource, config: TrainerConfig) -> dict[str, str]:
    """The source's columns; a margin only where it is learnt from."""
    mapping = {ours: theirs for ours, theirs in source.columns.items() if ours != MARGIN}
    margin = source.columns.get(MARGIN, config.reward_model.margin_column)
    if config.stage == "RewardModel" and margin is not None:
        mapping[MARGIN] = margin
    return mapping


def build(
    folder: Path,
    name: str,
    sources: Sources,
    config: DataConfig,
    tokeniser: Tokeniser,
) -> Built:
    """Writes the token set of the sources to `folder`. TrainerFailure where too much is refused or nothing is left."""
    prompts = any(schema is not None and schema.kind is Kind.PROMPT for _, schema in sources)
    tally, columns = Tally(name, prompts=prompts), _columns(sources)
    progress = Progress(f"tokenise {name}", sum(opened.size for opened, _ in sources))
    with TokenSetWriter(folder, _arity(sources), columns, records=prompts) as writer, progress:
        filling = _Filling(tally, writer, dict.fromkeys(columns, 0.0))
        for opened, schema in sources:
            for place, outcome, size in _outcomes(opened, schema, config, tokeniser):
                filling.take(place, outcome)
                progress.advance(size, f"{tally.rows} rows, {tally.tokens} tokens")
                if tally.hopeless(config):
                    break
            writer.end_source()
    _log.info(tally.summary())
    if tally.first:
        tally.write_refused(folder.parent / f"refused-{name}.jsonl")
    judge(tally, config, tokeniser.limits)
    return Built(tally.report(), tuple(writer.sources), tuple(filling.samples), digest_of(folder))


@dataclass
class _Filling:
    """A set that is being filled. `numbers`: of a row that does not bring its own."""

    tally: Tally
    writer: TokenSetWriter
    numbers: dict[str, float]
    samples: list[Sample] = field(default_factory=list)

    def take(self, place: Place, outcome: Encoded | RowRefused) -> None:
        if isinstance(outcome, RowRefused):
            self.tally.refuse(place, outcome)
            return
        if len(self.samples) < SAMPLES:
            self.samples.append(Sample(place, self.tally.training_rows, outcome.rows[0]))
        self.tally.use(outcome)
        for row in outcome.rows:
            self.writer.append(*row.examples, record=row.record, **{**self.numbers, **row.values})


def _arity(sources: Sources) -> int:
    pairs = (Kind.COMPARISON, Kind.CONVERSATIONS)
    return 2 if any(schema is not None and schema.kind in pairs for _, schema in sources) else 1


def _columns(sources: Sources) -> tuple[str, ...]:
    """Numbers of the set; a source without a margin has margin 0."""
    return (MARGIN,) if any(schema is not None and MARGIN in schema.mapping for _, schema in sources) else ()


Outcome = tuple[Place, Encoded | RowRefused, int]


def _outcomes(opened: OpenSource, schema: Schema | None, config: DataConfig, tokeniser: Tokeniser) -> Iterator[Outcome]:
    records = opened.records()
    while batch := list(itertools.islice(records, BATCH_ROWS)):
        parsed = [_parse(record, schema, config) for record in batch]
        encoded = iter(tokeniser.encode([row for row in parsed if not isinstance(row, RowRefused)]))
        for record, row in zip(batch, parsed, strict=True):
            yield record.place, row if isinstance(row, RowRefused) else next(encoded), record.size


def _parse(record: Row | Broken, schema: Schema | None, config: DataConfig) -> Parsed | RowRefused:
    if isinstance(record, Broken):
        return RowRefused(record.reason, record.detail)
    if schema is None:
        return RowRefused("MissingColumn", "the row has no columns")
    try:
        row = parse_row(record.values, schema.kind, schema.mapping, config.loss_on)
        if isinstance(row, Prompt) and schema.columns is not None:
            return replace(row, record=schema.columns.record(record.values))
        return row
    except RowRefused as refusal:
        return refusal


def digest_of(folder: Path) -> str:
    """`sha256:<hex>` over the files of a token set, in a fixed order, each with its name."""
    whole = hashlib.sha256()
    for name in set_files(folder):
        with (folder / name).open("rb") as file:
            whole.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return "sha256:" + whole.hexdigest()
