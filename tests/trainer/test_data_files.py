"""Files that are torn, or gone: while a job prepares, between its attempts, and after it has prepared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_kit import job, model_folder, model_source, pairs, source

from posttrain_api.reasons import Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.data import build
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.prepare import prepare
from posttrain_trainer.tokenset import TokenSet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def config(tmp_path: Path, model: Path) -> TrainerConfig:
    """A folder of three Parquet shards of ten rows."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        pq.write_table(pa.Table.from_pylist(pairs(30)[number::3]), shards / f"part-{number}.parquet")
    return job(tmp_path, [source(shards)], stage="SFT", model=model_source(model))


def shard(config: TrainerConfig, number: int) -> Path:
    return Path(config.data.train[0].path or "") / f"part-{number}.parquet"


def failure_of(config: TrainerConfig) -> TrainerFailure:
    with pytest.raises(TrainerFailure) as caught:
        prepare(config)
    return caught.value


def changed(config: TrainerConfig) -> TrainerConfig:
    """So that the data are prepared anew."""
    return config.model_copy(update={"grace_seconds": 99})


@pytest.mark.parametrize(
    "spoil", [lambda content: content[:-4], lambda content: content[:-40], lambda content: content[: len(content) // 2]]
)
def test_broken_footer(config: TrainerConfig, spoil: Callable[[bytes], bytes]) -> None:
    shard(config, 1).write_bytes(spoil(shard(config, 1).read_bytes()))
    failure = failure_of(config)
    assert failure.reason is Reason.DATASET_SCHEMA_INVALID
    assert "part-1.parquet: not a readable Parquet file" in failure.message
    assert "Write it again" in failure.message


def test_prepared_data_stay_when_a_shard_is_gone(config: TrainerConfig) -> None:
    prepared = prepare(config)
    shard(config, 1).unlink()
    assert prepare(config) == prepared
    assert len(TokenSet(Path(prepared.train_dir))) == 30


def test_a_fresh_attempt_names_the_shard_that_is_gone(config: TrainerConfig) -> None:
    """Without the record it would train on the other twenty rows and not say so."""
    prepare(config)
    shard(config, 1).unlink()
    failure = failure_of(changed(config))
    assert failure.reason is Reason.DATASET_NOT_FOUND
    for part in ("data.train[0] pvc://data/shards: part-1.parquet was there at the first attempt", "Put it back"):
        assert part in failure.message


def test_a_shard_that_comes_back_is_fine(config: TrainerConfig) -> None:
    first = prepare(config)
    content = shard(config, 1).read_bytes()
    shard(config, 1).unlink()
    failure_of(changed(config))
    shard(config, 1).write_bytes(content)
    assert prepare(changed(config)).data_digest == first.data_digest


@pytest.mark.parametrize("after", [0, 10])
def test_a_shard_that_goes_while_it_is_prepared(
    config: TrainerConfig, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    original = build.parse_row
    count = 0

    def parse(*arguments: Any) -> Any:
        nonlocal count
        if count == after:
            shard(config, 2).unlink()
        count += 1
        return original(*arguments)

    monkeypatch.setattr(build, "parse_row", parse)
    monkeypatch.setattr(build, "BATCH_ROWS", 5)
    failure = failure_of(config)
    assert failure.reason is Reason.DATASET_NOT_FOUND
    assert f"part-2.parquet: {shard(config, 2)} was listed and is gone" in failure.message
