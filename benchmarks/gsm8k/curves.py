"""Draws the curves of `jobs.yaml`'s runs, from their metrics.jsonl. Needs matplotlib only (`make learn`)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt

PANELS = {
    "gsm8k-sft": [
        ("loss", ("loss", "eval_loss")),
        ("token accuracy", ("mean_token_accuracy", "eval_mean_token_accuracy")),
    ],
    "gsm8k-dpo": [
        ("loss", ("loss", "eval_loss")),
        ("rewards/accuracies", ("rewards/accuracies", "eval_rewards/accuracies")),
        ("rewards/margins", ("rewards/margins", "eval_rewards/margins")),
    ],
    "gsm8k-grpo": [
        ("format reward", ("rewards/format/mean", "eval_rewards/format/mean")),
        ("math reward", ("rewards/math/mean", "eval_rewards/math/mean")),
        ("mean length", ("completions/mean_length",)),
    ],
}
SMOOTH = 0.8


def newest(runs: Path, job: str) -> list[dict[str, float]]:
    """Lines of the job's last run."""
    files = sorted(runs.glob(f"{job}/*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise SystemExit(f"{runs}/{job}: no metrics.jsonl. Run `make learn` first.")
    return [json.loads(line) for line in files[-1].read_text().splitlines()]


def series(lines: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values where the metric was measured."""
    there = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in there], [value for _, value in there]


def smoothed(values: list[float]) -> list[float]:
    """Exponential mean; the first steps count in full."""
    kept: list[float] = []
    for value in values:
        kept.append(value if not kept else SMOOTH * kept[-1] + (1 - SMOOTH) * value)
    return kept


def panel(axes: Any, lines: list[dict[str, float]], names: tuple[str, ...]) -> None:
    """Training smoothed, with the raw values behind it; evaluations as they are."""
    for name, colour in zip(names, ("tab:blue", "tab:orange"), strict=False):
        steps, values = series(lines, name)
        if name.startswith("eval_"):
            axes.plot(steps, values, "o-", color=colour, markersize=3, label="held out")
        else:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed(values), color=colour, label="training")
    axes.grid(alpha=0.3)


def draw(lines: list[dict[str, float]], job: str, out: Path) -> None:
    """One PNG of a job."""
    figure, all_axes = plt.subplots(1, len(PANELS[job]), figsize=(3.6 * len(PANELS[job]), 2.7), layout="constrained")
    for axes, (title, names) in zip(all_axes, PANELS[job], strict=True):
        panel(axes, lines, names)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
    all_axes[0].legend(fontsize=8)
    figure.savefig(out, dpi=75)
    print(f"{out}: {out.stat().st_size} bytes")


def summary(lines: list[dict[str, float]], job: str) -> None:
    """First and last value of each evaluation, for the documents."""
    for _, names in PANELS[job]:
        for name in names:
            _, values = series(lines, name)
            print(f"  {job} {name}: {values[0]:.4f} to {values[-1]:.4f}, best {min(values):.4f} / {max(values):.4f}")


def main() -> None:
    """A picture of each job that learns from answers."""
    parser = argparse.ArgumentParser("python -m benchmarks.gsm8k.curves", description=__doc__)
    parser.add_argument(
        "--runs", type=Path, default=Path(".build/learn/volumes/runs"), help="folder of the claim `runs`"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/users/images"), help="folder of the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for job in PANELS:
        lines = newest(options.runs, job)
        draw(lines, job, options.out / f"{job}.png")
        summary(lines, job)


if __name__ == "__main__":
    main()
