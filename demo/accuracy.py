"""Accuracy on held-out problems, measured with plain transformers and peft on an exported model.

A process of its own that imports nothing of this project: what it reports, anybody gets who loads the export. Called by
the demo as `python -m demo.accuracy QUESTIONS NAME=FOLDER...`; prints one JSON object per model and nothing else on
standard output. A folder holds either a whole model or a peft adapter, whose base is then taken from `--base`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 32
SHOWN = 3
SAMPLES = 4
"""Sampled answers to each problem: 800 in all, so a figure is within 3.5 points (two standard errors)."""


def main() -> None:
    """Measures each model named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m demo.accuracy", description=__doc__)
    parser.add_argument("questions", type=Path, help="JSONL with prompt and answer")
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--base", type=Path, help="folder of the base model, where a FOLDER holds an adapter")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.questions.read_text().splitlines()]
    for each in options.models:
        name, folder = each.split("=", 1)
        print(json.dumps({"name": name, **measure(Path(folder), options.base, rows)}), flush=True)


def measure(folder: Path, base: Path | None, rows: list[dict[str, str]]) -> dict[str, Any]:
    """{greedy, sampled, samples}: shares of right answers, by the most probable tokens and drawn at temperature 1 from
    the same seed for every model. Right = the answer's last number is the row's."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load(folder, base)
    said = answers(model, tokenizer, [row["prompt"] for row in rows], sample=False)
    torch.manual_seed(0)
    drawn = answers(model, tokenizer, [row["prompt"] for row in rows for _ in range(SAMPLES)], sample=True)
    right = correct(said, rows)
    samples = [
        {"prompt": row["prompt"], "said": text.strip(), "right": good}
        for row, text, good in zip(rows[:SHOWN], said[:SHOWN], right[:SHOWN], strict=True)
    ]
    sampled = correct(drawn, [row for row in rows for _ in range(SAMPLES)])
    return {"greedy": sum(right) / len(right), "sampled": sum(sampled) / len(sampled), "samples": samples}


def correct(said: list[str], rows: list[dict[str, str]]) -> list[bool]:
    """Whether each answer's last number is its row's."""
    return [last_number(text) == row["answer"] for text, row in zip(said, rows, strict=True)]


def load(folder: Path, base: Path | None) -> Any:
    """The model of a folder, an adapter put on its base. SystemExit where the base is not named."""
    if not (folder / "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    if base is None:
        raise SystemExit(f"{folder} holds an adapter: name its base with --base FOLDER")
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def answers(model: Any, tokenizer: Any, prompts: list[str], *, sample: bool) -> list[str]:
    """Continuations, greedy or sampled at temperature 1, in the order of `prompts`. Prompts of one length go together,
    so nothing is padded."""
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    groups: dict[int, list[int]] = defaultdict(list)
    for index, ids in enumerate(encoded):
        groups[len(ids)].append(index)
    said = [""] * len(prompts)
    for length, members in groups.items():
        batch = torch.tensor([encoded[index] for index in members])
        with torch.no_grad():
            out = model.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=NEW_TOKENS,
                do_sample=sample,
                top_k=0 if sample else None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        for index, row in zip(members, out, strict=True):
            said[index] = tokenizer.decode(row[length:], skip_special_tokens=True)
    return said


def last_number(text: str) -> str | None:
    """The last run of digits, None where there is none."""
    numbers = re.findall(r"\d+", text)
    return numbers[-1] if numbers else None


if __name__ == "__main__":
    main()
