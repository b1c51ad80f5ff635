"""Accuracies as a table with bars on the terminal, and as a picture for a browser.

Called once by the demo. The picture is a few rectangles written by hand: a plotting library would be the demo's largest
dependency.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from demo import show

WIDTH = 40
"""Characters of a bar of 100 %."""
KINDS = (("greedy", "#8fa3bf"), ("sampled", "#2f6db5"))
"""What is measured, with its colour in the picture."""


def show_table(measured: list[dict[str, Any]]) -> None:
    """One line for each model: the most probable answers, and sampled ones with their bar."""
    show.line(f"    {'':<18}{'greedy':>8}{'sampled':>9}")
    for each in measured:
        bar = "#" * round(WIDTH * each["sampled"])
        figures = f"{each['greedy']:>8.1%}{each['sampled']:>9.1%}"
        show.line(f"    {each['name']:<18}{figures}  {bar}", show.GREEN)


def show_answers(measured: list[dict[str, Any]]) -> None:
    """What each model says to the first problems."""
    for each in measured:
        show.line(f"    {each['name']}")
        for sample in each["samples"]:
            mark = "right" if sample["right"] else "wrong"
            show.line(f"        {sample['prompt']} -> {sample['said']!r} ({mark})", show.DIM)


def show_all(measured: list[dict[str, Any]], picture: Path) -> None:
    """Answers, table, and where the picture is."""
    show_answers(measured)
    show_table(measured)
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(svg(measured))
    show.line(f"    as a picture: {picture}")


def svg(measured: list[dict[str, Any]]) -> str:
    """Two bars for each model, 0 to 100 %."""
    rows = []
    for place, each in enumerate(measured):
        top = 40 + 44 * place
        rows.append(f'<text x="150" y="{top + 20}" text-anchor="end">{each["name"]}</text>')
        for line, (kind, colour) in enumerate(KINDS):
            share, y = each[kind], top + 16 * line
            rows.append(f'<rect x="160" y="{y}" width="{400 * share:.1f}" height="14" fill="{colour}"/>')
            rows.append(f'<text x="{166 + 400 * share:.1f}" y="{y + 12}">{share:.1%}</text>')
    legend = "".join(
        f'<rect x="{160 + 110 * place}" y="12" width="12" height="12" fill="{colour}"/>'
        f'<text x="{178 + 110 * place}" y="23">{kind}</text>'
        for place, (kind, colour) in enumerate(KINDS)
    )
    height = 50 + 44 * len(measured)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{height}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/>{legend}{"".join(rows)}</svg>\n'
    )
