"""Rows and jobs of `make learn`: pairs are right over wrong, held-out questions stay out, the jobs are valid."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gsm8k import data
from posttrain_cli.__main__ import main

ROOT = Path(__file__).parents[2]


def solved(number: int, verdicts: tuple[bool, ...], texts: tuple[str, ...] = ()) -> dict[str, Any]:
    """A row as published: four models' solutions of one question, each with its verdict."""
    texts = texts or tuple(f"{number}-{index}-{verdict}" for index, verdict in enumerate(verdicts))
    answers = zip(data.MODELS, verdicts, texts, strict=True)
    return {"question": f"q{number}"} | {
        model: {"is_correct": verdict, "solution": text} for model, verdict, text in answers
    }


def test_a_pair_is_a_right_solution_over_a_wrong_one() -> None:
    found = list(data.pairs(solved(1, (True, False, False, True)), 9))
    assert [(row["chosen"].split("-")[2], row["rejected"].split("-")[2]) for row in found] == [("True", "False")] * 4
    assert {row["prompt"] for row in found} == {"q1\n"}


def test_no_pair_where_all_are_right_or_all_wrong() -> None:
    assert [*data.pairs(solved(1, (True,) * 4), 9), *data.pairs(solved(2, (False,) * 4), 9)] == []


def test_pairs_of_a_question_are_bounded_and_equal_texts_come_once() -> None:
    assert len(list(data.pairs(solved(1, (True, False, False, True)), 2))) == 2
    assert len(list(data.pairs(solved(1, (True, True, False, False), ("a", "a", "b", "b")), 9))) == 1


def test_held_out_questions_are_in_no_training_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    rows = [{"question": f"t{number}", "answer": "a"} for number in range(6)]
    data.write(source / "train.jsonl", rows)
    lines = [json.dumps(solved(number, (True, False, True, False))) + "\n" for number in range(5)]
    (source / "example_model_solutions.jsonl").write_text("".join(lines))
    arguments = ["data", "--source", str(source), "--out", str(out), "--held-out", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    data.main()

    def prompts(name: str) -> set[str]:
        return {row["prompt"] for row in data.read(out / f"{name}.jsonl")}

    assert len(data.read(out / "text.jsonl")) == 4
    assert prompts("sft-train") == {"t0\n", "t1\n", "t2\n", "t3\n"}
    assert prompts("sft-eval") == {"t4\n", "t5\n"}
    assert (prompts("grpo-train"), prompts("grpo-eval")) == (prompts("sft-train"), prompts("sft-eval"))
    assert prompts("dpo-train") == {"q0\n", "q1\n", "q2\n"}
    assert prompts("dpo-eval") == {"q3\n", "q4\n"}


def test_the_jobs_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--strict", str(ROOT / "benchmarks/gsm8k/jobs.yaml")]) == 0, capsys.readouterr().out
