"""How the operator's benchmark is shown: progress on stderr, a table on stdout, JSON and a page in a file."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

Figures = dict[str, float]


def note(text: str) -> None:
    """A line on standard error with the time."""
    tqdm.write(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr)


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[..., object]]:
    """A progress bar: a line every ten seconds where nobody looks at a terminal."""
    every = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, desc=f"{title:<28}", mininterval=every, file=sys.stderr, leave=True) as shown:
        yield shown.update


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def spread(title: str, values: Sequence[float]) -> Figures:
    """p50 and p99."""
    return {f"{title} p50": percentile(values, 0.5), f"{title} p99": percentile(values, 0.99)}


def together(rounds: Sequence[Figures]) -> Figures:
    """The median of each figure over several rounds; writes are added up."""
    names = dict.fromkeys(name for figures in rounds for name in figures)
    found: Figures = {}
    for name in names:
        values = [figures[name] for figures in rounds if name in figures]
        found[name] = sum(values) if name.endswith("writes") else statistics.median(values)
    return found


def table(columns: Mapping[str, Figures]) -> str:
    """One row per figure, one column per size."""
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    lines = [f"{'':<46}" + "".join(f"{title:>14}" for title in columns)]
    for name in names:
        cells = (_shown(figures.get(name)) for figures in columns.values())
        lines.append(f"{name:<46}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    if value is None:
        return "–"
    if value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:,.2f}"


def markdown(columns: Mapping[str, Figures]) -> str:
    """The same as a table of Markdown."""
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(_shown(f.get(name)) for f in columns.values()) + " |" for name in names]
    return "\n".join(lines)


def save(path: Path, columns: Mapping[str, Figures], about: Mapping[str, object]) -> None:
    """Everything as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "figures": columns}, indent=1) + "\n")
