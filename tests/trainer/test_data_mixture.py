"""Several sources with weights: steps, what an epoch has of each, and weights that give nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare_kit import job, model_folder, model_source, pairs, source, write_jsonl

from posttrain_api.reasons import Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.mixture import epoch_rows, parts_of
from posttrain_trainer.prepare import prepare
from posttrain_trainer.sampler import Part, Sampler
from posttrain_trainer.tokenset import TokenSet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


def mixed(tmp_path: Path, model: Path, *weighted: tuple[int, float], **fields: Any) -> TrainerConfig:
    """One source per (rows, weight)."""
    sources = [
        source(write_jsonl(tmp_path / f"{index}.jsonl", pairs(count)), weight=weight)
        for index, (count, weight) in enumerate(weighted)
    ]
    return job(tmp_path, sources, **{"stage": "SFT", "model": model_source(model), **fields})


def test_weights_settle_the_steps(tmp_path: Path, model: Path) -> None:
    config = mixed(tmp_path, model, (20, 0.5), (5, 3.0))
    prepared = prepare(config)
    tokens = TokenSet(Path(prepared.train_dir))
    assert tokens.sources == (20, 5)
    parts = parts_of(config.data.train, tokens.sources)
    assert parts == (Part(20, 10), Part(5, 15))
    assert epoch_rows(parts) == 25
    assert prepared.resolved.total_steps == 7  # of 25 rows, four each


def test_a_weight_that_gives_no_row(tmp_path: Path, model: Path) -> None:
    with pytest.raises(TrainerFailure) as caught:
        prepare(mixed(tmp_path, model, (20, 1.0), (5, 0.01)))
    assert caught.value.reason is Reason.NOTHING_TO_LEARN
    for part in ("data.train[1].weight is 0.01", "of the 5 rows of pvc://data/1.jsonl", "at least 0.2", "remove"):
        assert part in caught.value.message


def test_a_set_of_other_sources_is_refused(tmp_path: Path, model: Path) -> None:
    config = mixed(tmp_path, model, (3, 1.0))
    with pytest.raises(TrainerFailure, match=r"the token set has 2 sources, data\.train has 1"):
        parts_of(config.data.train, (3, 4))


def test_a_data_set_of_one_row(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is trained on: the only row fills the one step of each epoch, and the log says so."""
    prepared = prepare(mixed(tmp_path, model, (1, 1.0), training={"epochs": 3.0}))
    assert (prepared.data_report.used, prepared.resolved.total_steps) == (1, 1)
    assert "an epoch has 1 rows, training.batchSize is 4" in caplog.text


def test_an_epoch_shorter_than_a_batch_repeats_rows(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = prepare(mixed(tmp_path, model, (3, 1.0), training={"epochs": None, "max_steps": 2}))
    assert prepared.resolved.total_steps == 2
    assert "an epoch has 3 rows, training.batchSize is 4: a step has rows of several epochs" in caplog.text
    rows = np.concatenate([Sampler(3, 4, 8, 0).rows(step) for step in range(2)])
    assert sorted(np.bincount(rows).tolist()) == [2, 3, 3]
