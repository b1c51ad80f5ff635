"""Token sets: what is written is read, whatever is asked for and in whatever order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_api.reasons import Reason
from posttrain_trainer import batching
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.tokenset import Example, TokenSet, TokenSetWriter, set_files


def example(length: int, first: int = 0) -> Example:
    return Example(np.arange(first, first + length, dtype=np.int32), (np.arange(length) > length // 2).astype(np.uint8))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    """Row r: examples of r + 1 and r + 3 tokens, margin r / 2; 20 rows of two sources and none of a third."""
    folder = tmp_path_factory.mktemp("set")
    with TokenSetWriter(folder, arity=2, columns=("margin",)) as writer:
        for row in range(20):
            if row == 12:
                writer.end_source()
            writer.append(example(row + 1, 100 * row), example(row + 3, 100 * row + 50), margin=row / 2)
        writer.end_source()
        writer.end_source()
    return TokenSet(folder)


def test_rows_come_back(pairs: TokenSet) -> None:
    assert (len(pairs), pairs.arity, pairs.sources) == (20, 2, (12, 8, 0))
    for number, row in enumerate(pairs):
        chosen, rejected = row.examples
        assert chosen.tokens.tolist() == list(range(100 * number, 100 * number + number + 1))
        assert rejected.tokens.tolist() == list(range(100 * number + 50, 100 * number + 53 + number))
        assert rejected.mask.tolist() == example(number + 3).mask.tolist()
        assert row.values == {"margin": number / 2}


@given(st.lists(st.integers(0, 19), max_size=8))
def test_lengths_of_any_rows(pairs: TokenSet, rows: list[int]) -> None:
    found = pairs.lengths(np.array(rows, dtype=np.int64))
    assert found.tolist() == [[row + 1, row + 3] for row in rows]
    assert found.shape == (len(rows), 2)


def test_lengths_of_all_and_of_a_block(pairs: TokenSet) -> None:
    assert pairs.lengths().tolist() == [[row + 1, row + 3] for row in range(20)]
    assert pairs.lengths(np.arange(5, 9)).tolist() == [[row + 1, row + 3] for row in range(5, 9)]


def test_a_row_past_the_end(pairs: TokenSet) -> None:
    for row in (-1, 20):
        with pytest.raises(IndexError):
            pairs[row]


def test_one_source_unless_said(tmp_path: Path) -> None:
    with TokenSetWriter(tmp_path) as writer:
        writer.append(example(3))
    assert TokenSet(tmp_path).sources == (1,)
    assert set_files(tmp_path) == ["set.json", "offsets.bin", "tokens.bin", "mask.bin"]


def test_rows_that_do_not_fit_the_set(tmp_path: Path) -> None:
    with TokenSetWriter(tmp_path, arity=2) as writer:
        with pytest.raises(ValueError, match="a row has 2 examples"):
            writer.append(example(3))
        with pytest.raises(ValueError, match="never a target"):
            writer.append(example(3), Example(np.zeros(2, dtype=np.int32), np.ones(2, dtype=np.uint8)))
        with pytest.raises(ValueError, match="the numbers"):
            writer.append(example(3), example(3), margin=1.0)


def test_an_interrupted_set_is_no_set(tmp_path: Path) -> None:
    with TokenSetWriter(tmp_path) as writer:
        writer.append(example(3))
    writer = TokenSetWriter(tmp_path)
    writer.append(example(4))
    writer.__exit__(RuntimeError, RuntimeError("stop"), None)
    with pytest.raises(FileNotFoundError):
        TokenSet(tmp_path)


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    with TokenSetWriter(tmp_path) as writer:
        writer.append(example(8))
    tokens = TokenSet(tmp_path)
    (tmp_path / "tokens.bin").write_bytes((tmp_path / "tokens.bin").read_bytes()[:-5])
    with pytest.raises(TrainerFailure, match=r"tokens\.bin: 5 bytes are missing") as caught:
        tokens[0]
    assert caught.value.reason is Reason.DATASET_NOT_FOUND


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_evaluation_in_blocks_sees_every_row_once(
    pairs: TokenSet, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setattr(batching, "BLOCK_ROWS", 3)
    shares = [list(batching.whole_set(pairs, batching.Share(rank, ranks, 50))) for rank in range(ranks)]
    assert len({len(micros) for micros in shares}) == 1
    seen = [number for micros in shares for micro in micros if micro.tokens for number in micro.numbers]
    assert sorted(seen) == list(range(20))
