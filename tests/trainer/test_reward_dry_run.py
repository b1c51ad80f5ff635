"""Rewards are tried before any rank starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from reward_kit import completion, of_function, reward, write_functions

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.rewards.dry_run import dry_run


def rows(**columns: Any) -> list[Any]:
    given = {"answer": "so\n#### 7", **columns}
    return [completion("", number=number, **given) for number in range(2)]


def test_each_is_called_once_with_the_gold(tmp_path: Path) -> None:
    configs = [
        reward(name="m", math={"column": "answer"}),
        reward(name="e", exact_match={"column": "answer"}),
        reward(name="f", format={"pattern": ".*#### -?[0-9]+"}),
        reward(name="l", length={"min_tokens": 1}),
        reward(name="rm", model={"source": {"uri": "pvc://m/r", "path": "/m"}}),
        of_function(write_functions(tmp_path), "answers"),
    ]
    trials = dry_run(configs, rows())
    assert [(trial.name, trial.mean, trial.scored, trial.rows) for trial in trials] == [
        (name, 1.0, 2, 2) for name in ("m", "e", "f", "l", "mine")
    ]


def test_a_sentence_where_no_column_holds_an_answer() -> None:
    (trial,) = dry_run([reward(name="r", regex={"pattern": "answer is [0-9]+"})], rows())
    assert trial.mean == 1.0


def test_a_text_that_is_there_is_kept() -> None:
    (trial,) = dry_run([reward(name="m", math={"column": "answer"})], [completion("#### 8", answer="7")])
    assert (trial.mean, trial.scored) == (0.0, 1)


@pytest.mark.parametrize("kind", ["math", "exact_match"])
def test_no_row_has_the_column(kind: str) -> None:
    with pytest.raises(TrainerFailure) as caught:
        dry_run([reward(name="m", on_error="Zero", **{kind: {"column": "solution"}})], rows())
    assert caught.value.reason is Reason.REWARD_ERROR
    assert "reward 'm': none of 2 rows has an answer in the column 'solution'" in caught.value.message
    assert "(no row has it); columns beside the prompt: answer." in caught.value.message


def test_no_answer_can_be_read() -> None:
    with pytest.raises(TrainerFailure, match="its first is 'blue'"):
        dry_run([reward(name="m", math={"column": "answer"})], rows(answer="blue"))


def test_errors_in_code_end_the_job_and_failures_do_what_on_error_says(tmp_path: Path) -> None:
    path = write_functions(tmp_path)
    with pytest.raises(TrainerFailure, match="no function 'nope'"):
        dry_run([of_function(path, "nope", on_error="Skip")], rows())
    with pytest.raises(TrainerFailure, match="division by zero"):
        dry_run([of_function(path, "raises")], rows())
    (trial,) = dry_run([of_function(path, "raises", on_error="Skip")], rows())
    assert trial.scored == 0
    assert math.isnan(trial.mean)


def test_nothing_to_try() -> None:
    assert dry_run([], rows()) == ()
    assert dry_run([reward(name="l", length={})], []) == ()
