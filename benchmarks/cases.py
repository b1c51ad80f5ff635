"""What both sides of a comparison train: one model folder, one file of rows, and how they are told to run a round.

`trainer_vs_trl` and `gpu_check` make a case and start one child process for each side, so that peak memory is that
side's alone. A child answers commands on its standard input, one JSON line each: `try SIZE`, `round SIZE`, `end`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PAD, END, FIRST_WORD = 0, 1, 3
GROUP, LUCKY = 8, "777"
"""Of stage RL: completions of a prompt; a completion with this in one of its words is rewarded, about every sixth is,
whatever the vocabulary."""


@dataclass(frozen=True)
class Case:
    """`folder` holds `model/` and `rows.jsonl`. One round is one epoch of `rows` rows in batches of `batch`.

    In stage RL rows are prompts, and `answer` is the longest completion."""

    stage: str
    folder: str
    rows: int
    batch: int
    vocabulary: int
    hidden: int
    layers: int
    max_length: int
    threads: int
    prompt: int = 50
    answer: int = 90
    spread: float = 0.8
    device: str = "cpu"
    precision: str = "FP32"
    zero_stage: int = 0
    packed: bool | None = None
    """Ours: all sequences of a micro-batch in one line. None: as the trainer does."""

    @property
    def steps(self) -> int:
        """Optimizer steps of one round."""
        return self.rows // self.batch


@dataclass(frozen=True)
class Round:
    """Seconds of the wall clock and of the process, tokens of the rows (no padding), means of loss and gradient norm,
    seconds by phase."""

    seconds: float
    cpu_seconds: float
    tokens: int
    loss: float
    grad_norm: float
    phases: dict[str, float] = field(default_factory=dict)


class Side(Protocol):
    """One trainer on one case."""

    def round(self, size: int, steps: int) -> Round:
        """Trains `steps` steps with micro-batches of `size`: rows for TRL, tokens for ours."""
        ...


def write_case(case: Case) -> None:
    """Random rows of mixed length (log-normal) and a Llama-shaped model with random weights."""
    import torch
    import transformers

    folder = Path(case.folder)
    generator = np.random.default_rng(0)
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(case.rows):
            file.write(json.dumps(_row(case, generator)) + "\n")
    heads = max(1, case.hidden // 64)
    shape = transformers.LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 11 // 4,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=case.max_length,
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(shape).save_pretrained(folder / "model")
    # A special token that is a number would be found inside of others.
    words = {"<pad>": PAD, "<end>": END} | {str(number): number for number in range(END + 1, case.vocabulary)}
    _tokenizer(words).save_pretrained(folder / "model")


def _row(case: Case, generator: Any) -> dict[str, Any]:
    def words(median: int, limit: int) -> list[int]:
        length = int(np.clip(generator.lognormal(np.log(median), case.spread), 4, limit))
        return [int(word) for word in generator.integers(FIRST_WORD, case.vocabulary, length)]

    answers = 2 if case.stage == "Preference" else 1
    prompt = words(case.prompt, case.max_length // 3)
    return {"prompt": prompt, "answers": [[*words(case.answer, case.max_length // 2), END] for _ in range(answers)]}


def _tokenizer(words: dict[str, int]) -> Any:
    import tokenizers
    import transformers

    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="2"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<end>")


def read_rows(case: Case) -> list[dict[str, Any]]:
    """The rows as they were written."""
    return [json.loads(line) for line in (Path(case.folder) / "rows.jsonl").read_text().splitlines()]


def row_tokens(row: dict[str, Any]) -> int:
    """Tokens that a model reads for a row: the prompt once for each answer."""
    return sum(len(row["prompt"]) + len(answer) for answer in row["answers"])


def case_file(case: Case) -> str:
    """Path of the written case."""
    path = Path(case.folder) / "case.json"
    path.write_text(json.dumps(asdict(case)))
    return str(path)


def serve(make: Callable[[Case], Side]) -> None:
    """The child: loads its case, answers commands until `end`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; answers have a channel of their own
    case = Case(**json.loads(Path(sys.argv[1]).read_text()))
    import torch

    torch.set_num_threads(case.threads)
    side = make(case)
    torch.set_num_threads(case.threads)  # the trainer's own runtime has set it meanwhile
    say(answers, {"ready": True})
    for line in sys.stdin:
        command, *size = line.split()
        if command == "end":
            break
        forget_peak(case)
        measured = asdict(side.round(int(size[0]), 1 if command == "try" else case.steps))
        say(answers, {**measured, "peak": peak(case)})
    os._exit(0)  # a process group is open; its end is of no interest


def say(answers: Any, value: dict[str, Any]) -> None:
    """One JSON line to the parent."""
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def peak(case: Case) -> float:
    """Bytes since `forget_peak`: of the accelerator where there is one, else the highest resident size."""
    if case.device == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated())
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget_peak(case: Case) -> None:
    """From here on. Linux: 5 in clear_refs sets the mark back to what is resident now (proc(5))."""
    if case.device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


class Stopwatch:
    """Wall and process seconds between `start` and the last `lap`."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """From now."""
        self._began = (time.perf_counter(), time.process_time())
        self.seconds = self.cpu_seconds = 0.0

    def lap(self) -> None:
        """Until now."""
        self.seconds = time.perf_counter() - self._began[0]
        self.cpu_seconds = time.process_time() - self._began[1]
