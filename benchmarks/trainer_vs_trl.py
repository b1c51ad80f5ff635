"""Our trainer beside TRL's: same model, same rows, same metrics on both sides, alternating in one run.

Each side is a process of its own. Each first tries its micro-batch sizes for one step and keeps the fastest; then
rounds alternate, a round being one epoch over the same rows of mixed length. Printed are the medians, and the ratio
ours / TRL as the median over rounds with its range. Rates are per second of the process's CPU time as well, which other
work on the machine changes little: with one thread (the default) that is what a wall clock shows on an idle machine.

The last part trains a few long rows at a vocabulary of 151,936 for the peak of memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, case_file, write_case

SIZES = {"ours": (512, 1024, 2048, 8192), "trl": (1, 2, 4, 8)}
"""Tokens of a micro-batch for ours, rows (pairs) of one for TRL; the last is each side's own default."""
ROLLOUT_SIZES = {"ours": (2048, 8192), "trl": (16, 64)}
"""The same for GRPO: completions of a micro-batch for TRL."""
SIDES = ("ours", "trl")
STAGES = ("SFT", "Preference", "RL")
EXAMPLES = """examples:
  make bench-trainer                                     everything, about six minutes on one idle core
  python -m benchmarks.trainer_vs_trl --quick            one round, one size each: about two minutes, rough
  python -m benchmarks.trainer_vs_trl --stages SFT --rounds 5 --hidden 512 --no-memory

how to read it:
  a ratio of 1.5 at tokens per CPU second: ours trains one and a half times as many tokens in the same time.
  a ratio of 0.5 at peak memory: ours needs half as much. Loss and gradient norm agree in their first
  digits only: a round has the same rows on both sides, its batches have not.
"""


@dataclass
class Child:
    """One side's process. `say` sends a command and waits for its answer."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    def say(self, command: str) -> dict[str, Any]:
        """The answer to `command`. SystemExit with the end of the log where the process died."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of the child."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.name} died; the end of its log:\n{self.log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Lets it go."""
        assert self.process.stdin is not None
        self.process.stdin.write("end\n")
        self.process.stdin.close()
        self.process.wait(timeout=30)


def start(case: Case, name: str) -> Child:
    """A child with the case loaded; its answer to that is still to come."""
    log = Path(case.folder) / f"{name}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads), "HF_HUB_OFFLINE": "1"}
    module = f"benchmarks.side_{name}" + ("_grpo" if case.stage == "RL" else "")
    command = [sys.executable, "-m", module, case_file(case)]
    note(f"starting {name}: {case.stage}, vocabulary {case.vocabulary:,}")
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log.open("w"), text=True, env=environment)
    return Child(name, process, log)


def note(text: str) -> None:
    """Progress, on standard error."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def rate(measured: dict[str, Any]) -> float:
    """Tokens per CPU second."""
    return float(measured["tokens"] / measured["cpu_seconds"])


def tried(child: Child, sizes: tuple[int, ...], title: str) -> dict[int, float]:
    """Rate of each size in a step of its own; the first step of all warms up and counts only where there is
    one size."""
    warm = rate(child.say(f"try {sizes[0]}"))
    rates = {size: rate(child.say(f"try {size}")) for size in sizes} if len(sizes) > 1 else {sizes[0]: warm}
    note(f"{title}: {child.name} tried {listed(rates)}")
    return rates


def listed(rates: dict[int, float]) -> str:
    """Sizes with their rates."""
    return ", ".join(f"{size}: {value:,.0f}/s" for size, value in rates.items())


@dataclass(frozen=True)
class Compared:
    """Rounds of both sides, in order, and what each micro-batch size gave before them."""

    case: Case
    tries: dict[str, dict[int, float]]
    rounds: dict[str, list[dict[str, Any]]]


def compare(case: Case, sizes: dict[str, tuple[int, ...]], rounds: int) -> Compared:
    """Both children at once; only one of them works at a time."""
    write_case(case)
    children = {name: start(case, name) for name in SIDES}
    try:
        for child in children.values():
            child.answer()
        tries = {name: tried(children[name], sizes[name], case.stage) for name in SIDES}
        best = {name: max(rates, key=lambda size: rates[size]) for name, rates in tries.items()}
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        for number in range(rounds):
            for name in SIDES if number % 2 == 0 else SIDES[::-1]:
                measured[name].append(children[name].say(f"round {best[name]}"))
                note(f"{case.stage}: round {number + 1} of {rounds}, {name}: {rate(measured[name][-1]):,.0f} tokens/s")
        for child in children.values():
            child.end()
        return Compared(case, tries, measured)
    finally:
        for child in children.values():
            child.process.kill()


Measure = Callable[[dict[str, Any]], float]


def line(title: str, compared: Compared, measure: Measure) -> str:
    """Medians of both sides and the median ratio with its range."""
    ours, theirs = ([measure(each) for each in compared.rounds[name]] for name in SIDES)
    ratios = [first / second if second else math.nan for first, second in zip(ours, theirs, strict=True)]
    shown = "".join(f"{statistics.median(side):>12,.{_digits(statistics.median(side))}f}" for side in (ours, theirs))
    return f"  {title:<28}{shown}{statistics.median(ratios):>9.2f}  ({min(ratios):.2f} to {max(ratios):.2f})"


def _digits(value: float) -> int:
    return 0 if value >= 100 else 4


def table(compared: Compared, title: str) -> str:
    """One block of the report."""
    case, ours, theirs = compared.case, compared.tries["ours"], compared.tries["trl"]
    head = f"{title}\n  micro-batches: ours, tokens {listed(ours)}; TRL, rows {listed(theirs)}"
    if len(ours) > 1 and len(theirs) > 1:
        ratio = list(ours.values())[-1] / list(theirs.values())[-1]
        head += f"\n  at the default of each: ratio {ratio:.2f} (one step); below, each at its fastest"
    model = f"vocabulary {case.vocabulary:,}, hidden {case.hidden}, layers {case.layers}"
    shape = f"  {case.rows} rows, {case.batch} a step; {model}"
    lines = [head, shape, f"  {'':<28}{'ours':>12}{'TRL':>12}{'ratio':>9}"]
    lines.append(line("tokens per CPU second", compared, rate))
    lines.append(line("tokens per second", compared, lambda each: each["tokens"] / each["seconds"]))
    steps = case.steps
    lines.append(line("step, s", compared, lambda each: each["seconds"] / steps))
    if case.stage == "RL":
        lines.append(line("  rollout, s", compared, lambda each: each["phases"]["rollout"] / steps))
    lines.append(line("  forward and backward, s", compared, lambda each: computing(each) / steps))
    lines.append(line("  all else, s", compared, lambda each: (each["seconds"] - computing(each)) / steps))
    lines.append(line("peak memory, MiB", compared, lambda each: each["peak"] / 2**20))
    lines.append(line("loss", compared, lambda each: each["loss"]))
    lines.append(line("gradient norm", compared, lambda each: each["grad_norm"]))
    return "\n".join(lines)


def computing(measured: dict[str, Any]) -> float:
    """Seconds in forward and backward, the reference's included."""
    phases = measured["phases"]
    return float(phases["forward_backward"] + phases.get("reference", 0.0))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.trainer_vs_trl",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="one round and no search for the best micro-batch size")
    made.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    made.add_argument("--rounds", type=int, default=3, help="rounds of each side (default 3)")
    made.add_argument("--threads", type=int, default=1, help="threads of torch on both sides (default 1)")
    made.add_argument("--hidden", type=int, default=256, help="width of the model (default 256)")
    made.add_argument("--layers", type=int, default=4, help="layers of the model (default 4)")
    made.add_argument("--vocabulary", type=int, default=8192, help="of the speed comparison (default 8192)")
    made.add_argument("--no-memory", action="store_true", help="leave out the part at a vocabulary of 151,936")
    return made


def speed(options: argparse.Namespace, stage: str, folder: str) -> str:
    """The table of one stage."""
    if stage == "RL":
        return rollouts(options, folder)
    rows, batch = (64, 32) if stage == "SFT" else (32, 16)
    shape = (options.vocabulary, options.hidden, options.layers)
    case = Case(stage, folder, rows, batch, *shape, max_length=512, threads=options.threads)
    sizes: dict[str, tuple[int, ...]] = {"ours": (1024,), "trl": (2,)} if options.quick else SIZES
    return table(compare(case, sizes, 1 if options.quick else options.rounds), f"{stage}, rows of mixed length")


def rollouts(options: argparse.Namespace, folder: str) -> str:
    """GRPO, from the prompts to the update: two steps of 8 prompts with 8 completions each."""
    shape = (options.vocabulary, options.hidden, options.layers)
    case = Case("RL", folder, 16, 8, *shape, max_length=512, threads=options.threads, answer=64)
    sizes: dict[str, tuple[int, ...]] = {"ours": (8192,), "trl": (64,)} if options.quick else ROLLOUT_SIZES
    return table(compare(case, sizes, 1 if options.quick else options.rounds), "GRPO, rollout and update")


def memory(options: argparse.Namespace, stage: str, folder: str) -> str:
    """Rows of about 500 tokens, nearly all of them counted; 4,096 tokens in a micro-batch on both sides."""
    if stage == "RL":
        shape = (151_936, 128, 1)
        case = Case("RL", folder, 4, 4, *shape, max_length=1024, threads=options.threads, answer=128)
        return table(compare(case, {"ours": (4096,), "trl": (32,)}, 1), "GRPO, memory at a large vocabulary")
    rows = 8 if stage == "SFT" else 4
    small = Case(stage, folder, rows, rows, 151_936, 128, 1, max_length=1024, threads=options.threads)
    case = replace(small, prompt=6, answer=500, spread=0.0)
    return table(compare(case, {"ours": (4096,), "trl": (rows,)}, 1), f"{stage}, memory at a large vocabulary")


def main() -> None:
    """Prints one table after another as they are ready."""
    options = parser().parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch", "deepspeed")}
    print(
        ", ".join(f"{name} {version}" for name, version in versions.items()), f"threads {options.threads}", flush=True
    )
    parts = [speed] if options.no_memory else [speed, memory]
    for part in parts:
        for stage in options.stages:
            with tempfile.TemporaryDirectory() as folder:
                print("\n" + part(options, stage, folder), flush=True)


if __name__ == "__main__":
    main()
