"""What a slow storage costs a training: checkpoints written straight to it, staged on the node, and none but the last.

Each case is a real job as `posttrain run` runs it (SFT of a small model, every weight, two ranks on the CPU), same
seed, same rows. The storage is slow by `slow_storage.c`, which the job's processes load before libc: a write below the
run's `checkpoints` waits as long as it would on a storage of so many bytes per second, one storage for all ranks. A
short job first measures a step and the size of a checkpoint; the rate is chosen so that a save takes as long as
`--save-steps` steps. The final weights of all cases must be equal byte for byte.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.slow_disk import Storage, check, compiled, note
from benchmarks.slow_jobs import Measured, Shape, run, write_data

CASES = ("no saves", "straight", "staged")
EXAMPLES = """examples:
  make bench-storage                                        some five minutes on two cores
  python -m benchmarks.slow_storage --quick                 few steps, a small model: two to four minutes, rough
  python -m benchmarks.slow_storage --save-steps 15         the next save is due before the copy ends

how to read it:
  steps alike: as if every step took the median of all cases, because other work on the machine changes them from job
  to job; what is left is the time that the saves take from training.
  stood still: seconds in which no rank trains because of a save. saveSeconds: from the begin of a save until every file
  is on the storage, as the checkpoint's manifest has it. The last save of a job is never staged.
"""


def measure(folder: Path, library: Path, shape: Shape) -> tuple[Storage, dict[str, Measured]]:
    """The storage as it was chosen, and every case on it."""
    fast = Storage(folder, library)
    check(fast)
    write_data(folder / "volumes", shape)
    trial = run("trial", replace(shape, steps=8), {}, fast)
    rate = size_of(trial) / (shape.save_steps * statistics.median(trial.steps(copying=False)))
    note(f"checkpoint {size_of(trial) / 1e6:.0f} MB, saved in {trial.last_save:.1f} s; now {rate / 1e6:.1f} MB/s")
    slow, often = replace(fast, rate=rate), {"everySteps": shape.every}
    policies: tuple[dict[str, Any], ...] = ({}, often, {**often, "staging": "Disk"})
    pairs = zip(CASES, policies, strict=True)
    return slow, {case: run(case.replace(" ", "-"), shape, policy, slow) for case, policy in pairs}


def size_of(measured: Measured) -> int:
    """Bytes of the newest checkpoint."""
    return sum(entry.size for entry in measured.manifests[max(measured.manifests)].files.values())


def table(cases: dict[str, Measured], shape: Shape) -> str:
    """A line for each figure, a column for each case."""
    base, between = cases["no saves"], shape.saves - 1
    steps = [step for each in cases.values() for copying in (False, True) for step in each.steps(copying)]
    trained = shape.steps * statistics.median(steps)
    rows: list[tuple[str, Callable[[Measured], float | None]]] = [
        ("total, s", lambda each: each.seconds),
        ("  over no saves", lambda each: each.seconds / base.seconds),
        ("  the same, steps alike", lambda each: (trained + each.stood_still) / (trained + base.stood_still)),
        ("stood still, s per save", lambda each: each.on_the_way / between if len(each.manifests) > 1 else None),
        ("  with the last save, s", lambda each: each.stood_still / len(each.manifests)),
        ("  the last save alone, s", lambda each: each.last_save),
        ("saveSeconds before it", lambda each: _middle(each.save_seconds[:-1])),
        ("step, nothing copied, s", lambda each: _middle(each.steps(copying=False))),
        ("step, copy under way, s", lambda each: _middle(each.steps(copying=True))),
        ("  so many steps", lambda each: len(each.steps(copying=True))),
    ]
    head = f"  {'':<26}" + "".join(f"{case:>12}" for case in cases)
    return "\n".join([head, *(_row(title, [figure(each) for each in cases.values()]) for title, figure in rows)])


def _middle(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _row(title: str, values: Sequence[float | None]) -> str:
    shown = ("-" if value is None else f"{value:.0f}" if isinstance(value, int) else f"{value:.2f}" for value in values)
    return f"  {title:<26}" + "".join(f"{value:>12}" for value in shown)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.slow_storage",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shape = Shape()
    made.add_argument("--quick", action="store_true", help="12 steps of a small model, saved every 4: rough")
    made.add_argument("--steps", type=int, default=shape.steps, help=f"default {shape.steps}")
    made.add_argument("--every", type=int, default=shape.every, help=f"steps between saves (default {shape.every})")
    made.add_argument("--hidden", type=int, default=shape.hidden, help=f"width of the model (default {shape.hidden})")
    made.add_argument("--save-steps", type=float, default=shape.save_steps, help="steps' time of a save (default 5)")
    return made


def main() -> None:
    """Prints the table."""
    options = parser().parse_args()
    shape = Shape(options.steps, options.every, options.hidden, save_steps=options.save_steps)
    if options.quick:
        shape = Shape(steps=12, every=4, hidden=256, save_steps=2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        storage, cases = measure(folder, compiled(folder), shape)
    first, least = cases["straight"], 0.9 * size_of(cases["straight"]) / (storage.rate or 1)
    if min(second for each in cases.values() for second in each.save_seconds) < least:
        raise SystemExit("slow_storage: a save was faster than the storage: it was not slowed")
    if len({each.weights for each in cases.values()}) != 1 or not first.weights:
        raise SystemExit(f"slow_storage: the weights differ: { {case: each.weights for case, each in cases.items()} }")
    print(f"{shape.ranks} ranks, {shape.steps} steps, saved every {shape.every}")
    print(f"checkpoint {size_of(first) / 1e6:.0f} MB, storage {(storage.rate or 0) / 1e6:.1f} MB/s")
    print("the final weights are equal byte for byte")
    print(table(cases, shape))


if __name__ == "__main__":
    main()
