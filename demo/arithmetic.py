"""The demo's data: additions and subtractions below one hundred, with worked answers.

Real learning must be visible in minutes on two cores, so the task is one that a model of less than a million
parameters can learn: two-digit arithmetic, digit by digit. Held-out problems never appear in the other sets, so
accuracy on them is arithmetic and not memory. A share of the answers for fine-tuning is wrong on purpose: later stages
(reward model, preference, reinforcement learning) then have something to correct. Called by the demo's steps and by the
tests; pure: the same seed gives the same rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

HELD_OUT = 200
PRETRAIN_ROWS = 24_000
SFT_ROWS = 4_000
WRONG_SHARE = 0.4
PAIR_ROWS = 4_000
PROMPT_ROWS = 8_000
QUESTION_SHARE = 0.05
"""Of the pre-training documents that are in the form of a question: the base model has seen a few."""

Row = dict[str, str]


@dataclass(frozen=True)
class Problem:
    """a + b, or a - b with a >= b; both below one hundred."""

    a: int
    sign: str
    b: int

    @property
    def answer(self) -> int:
        """The right result."""
        return self.a + self.b if self.sign == "+" else self.a - self.b

    @property
    def question(self) -> str:
        """As a person would ask it: the prompt."""
        return f"What is {self.a} {self.sign} {self.b}?"


@dataclass(frozen=True)
class DataSets:
    """Rows ready to be written as JSONL, each set to a file of its name: documents, prompt/completion pairs, questions
    with a right and a wrong answer, questions with their result, and held-out ones."""

    pretrain: tuple[Row, ...]
    sft: tuple[Row, ...]
    pairs: tuple[Row, ...]
    prompts: tuple[Row, ...]
    held_out: tuple[Row, ...]


def generate(seed: int = 0) -> DataSets:
    """No held-out problem is in any of the other sets."""
    source = random.Random(seed)
    problems = all_problems()
    source.shuffle(problems)
    held_out, known = problems[:HELD_OUT], problems[HELD_OUT:]
    return DataSets(
        pretrain=tuple(_document(problem, source) for problem in _drawn(known, PRETRAIN_ROWS, source)),
        sft=tuple(_exercise(problem, source) for problem in _drawn(known, SFT_ROWS, source)),
        pairs=tuple(_pair(problem, source) for problem in _drawn(known, PAIR_ROWS, source)),
        prompts=tuple(_prompt(problem) for problem in _drawn(known, PROMPT_ROWS, source)),
        held_out=tuple(_held_out(problem) for problem in held_out),
    )


def all_problems() -> list[Problem]:
    """Every addition and subtraction of two numbers from 0 to 99, results not below zero."""
    numbers = range(100)
    sums = [Problem(a, "+", b) for a in numbers for b in numbers]
    return sums + [Problem(a, "-", b) for a in numbers for b in numbers if a >= b]


def worked(problem: Problem, result: int | None = None) -> str:
    """The steps and the result: ones, then tens with carry or borrow. `result` puts another number at the end."""
    ones_a, ones_b, tens_a, tens_b = problem.a % 10, problem.b % 10, problem.a // 10, problem.b // 10
    if problem.sign == "+":
        ones, carry = ones_a + ones_b, int(ones_a + ones_b > 9)
        steps = f"{ones_a}+{ones_b}={ones}, {tens_a}+{tens_b}+{carry}={tens_a + tens_b + carry}"
    else:
        borrow = int(ones_a < ones_b)
        top = ones_a + 10 * borrow
        steps = f"{top}-{ones_b}={top - ones_b}, {tens_a}-{tens_b}-{borrow}={tens_a - tens_b - borrow}"
    return f"{steps}, so {problem.answer if result is None else result}"


def wrong_answer(problem: Problem, source: random.Random) -> int:
    """A plausible mistake: one or ten off, never below zero."""
    return source.choice([value for offset in (-10, -1, 1, 10) if (value := problem.answer + offset) >= 0])


def _drawn(problems: Sequence[Problem], count: int, source: random.Random) -> Iterator[Problem]:
    return (problems[source.randrange(len(problems))] for _ in range(count))


def _document(problem: Problem, source: random.Random) -> Row:
    if source.random() < QUESTION_SHARE:
        return {"text": f"{problem.question} {worked(problem)}"}
    return {"text": f"{problem.a}{problem.sign}{problem.b}: {worked(problem)}"}


def _held_out(problem: Problem) -> Row:
    return {"prompt": problem.question, "worked": " " + worked(problem), "answer": str(problem.answer)}


def _exercise(problem: Problem, source: random.Random) -> Row:
    result = wrong_answer(problem, source) if source.random() < WRONG_SHARE else None
    return {"prompt": problem.question, "completion": " " + worked(problem, result)}


def _pair(problem: Problem, source: random.Random) -> Row:
    wrong = worked(problem, wrong_answer(problem, source))
    return {"prompt": problem.question, "chosen": " " + worked(problem), "rejected": " " + wrong}


def _prompt(problem: Problem) -> Row:
    return {"prompt": problem.question, "answer": str(problem.answer)}
