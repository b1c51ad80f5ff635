"""The demo's data set: right where it says so, wrong as often as it says so, and nothing held out is trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from demo import arithmetic

SETS = arithmetic.generate(seed=3)
PROBLEM = re.compile(r"(\d+) ?([+-]) ?(\d+)")


def first_problems(texts: Iterable[str]) -> set[tuple[str, ...]]:
    return {match.groups() for text in texts if (match := PROBLEM.search(text))}


def test_the_same_seed_gives_the_same_rows() -> None:
    assert arithmetic.generate(seed=3) == SETS
    assert arithmetic.generate(seed=4) != SETS


def test_no_held_out_problem_is_trained_on() -> None:
    held_out = first_problems(row["prompt"] for row in SETS.held_out)
    assert len(held_out) == arithmetic.HELD_OUT
    assert held_out.isdisjoint(first_problems(row["text"] for row in SETS.pretrain))
    for rows in (SETS.sft, SETS.pairs, SETS.prompts):
        assert held_out.isdisjoint(first_problems(row["prompt"] for row in rows))


def test_four_tenths_of_the_training_answers_are_wrong_and_no_other() -> None:
    wrong = 0
    for row in SETS.sft:
        match = PROBLEM.search(row["prompt"])
        assert match
        problem = arithmetic.Problem(int(match[1]), match[2], int(match[3]))
        wrong += not row["completion"].endswith(f"so {problem.answer}")
    assert 0.37 < wrong / len(SETS.sft) < 0.43
    for row in SETS.pairs:
        right, given = row["chosen"].rsplit(" ", 1), row["rejected"].rsplit(" ", 1)
        assert right[0] == given[0]
        assert right[1] != given[1]
    for row in SETS.held_out:
        assert row["worked"].endswith(f"so {row['answer']}")


@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from("+-"))
def test_every_step_of_a_worked_answer_is_true(a: int, b: int, sign: str) -> None:
    low, high = sorted((a, b))
    problem = arithmetic.Problem(high, sign, low)
    ones, tens, last = re.split(", so |, ", arithmetic.worked(problem))
    for step in (ones, tens):
        left, right = step.split("=")
        assert sum(int(part) for part in re.findall(r"-?\d+", left.replace("+", " "))) == int(right)
    assert int(last) == problem.answer == eval(f"{high}{sign}{low}")
