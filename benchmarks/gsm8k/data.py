"""Writes the rows that `jobs.yaml` reads, from GSM8K as it was published (github.com/openai/grade-school-math).

Of train.jsonl: every question with its answer as plain text for pre-training, the rows themselves for SFT, the last
ones held out, and its questions with the right answers for GRPO. Of example_model_solutions.jsonl: pairs for DPO. Four
models answered each question there, and each answer is marked right or wrong; a pair is a right and a wrong answer to
one question. Questions, not pairs, are held out, so that no held-out answer's question was trained on.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
EXAMPLES = """example:
  python -m benchmarks.gsm8k.data --source ~/gsm8k --out .build/learn/volumes/gsm8k
  posttrain run --workdir .build/learn benchmarks/gsm8k/jobs.yaml
  python -m benchmarks.gsm8k.curves
`make learn GSM8K=~/gsm8k` does all three.
"""


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def pairs(row: dict[str, Any], most: int) -> Iterator[dict[str, str]]:
    """At most `most` pairs of a question: a right solution and a wrong one, texts that occur twice once only."""
    solutions = {row[model]["solution"]: row[model]["is_correct"] for model in MODELS}
    right = [text for text, correct in solutions.items() if correct]
    wrong = [text for text, correct in solutions.items() if not correct]
    for chosen, rejected in itertools.islice(itertools.product(right, wrong), most):
        yield {"prompt": row["question"] + "\n", "chosen": chosen, "rejected": rejected}


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """JSONL, and what was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    """Seven files."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gsm8k.data",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=Path, required=True, help="folder with the two published files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the claim `gsm8k`")
    parser.add_argument("--held-out", type=int, default=200, help="questions kept for evaluation (default 200)")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of one question at most (default 2)")
    options = parser.parse_args()
    questions, solved = (read(options.source / name) for name in ("train.jsonl", "example_model_solutions.jsonl"))
    rows = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in questions]
    split, cut = len(rows) - options.held_out, len(solved) - options.held_out
    write(options.out / "text.jsonl", [{"text": row["prompt"] + row["completion"]} for row in rows[:split]])
    write(options.out / "sft-train.jsonl", rows[:split])
    write(options.out / "sft-eval.jsonl", rows[split:])
    asked = [{"prompt": row["prompt"], "answer": row["completion"]} for row in rows]
    write(options.out / "grpo-train.jsonl", asked[:split])
    write(options.out / "grpo-eval.jsonl", asked[split:])
    for name, some in (("dpo-train", solved[:cut]), ("dpo-eval", solved[cut:])):
        write(options.out / f"{name}.jsonl", [pair for row in some for pair in pairs(row, options.pairs)])


if __name__ == "__main__":
    main()
