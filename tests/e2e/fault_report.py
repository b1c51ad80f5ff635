"""Writes the report of the fault matrix: `python tests/e2e/fault_report.py RESULTS.jsonl docs/faults.md`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

INTRODUCTION = """# Faults

What happens to a job of two pods when something dies in the middle. Made by `make test-faults`
([test_fault_matrix.py](../tests/e2e/test_fault_matrix.py)): a real API server, the real training-operator, the operator
installed by its chart, real trainers, real signals. A checkpoint is written every 8 steps (SFT) or 3 (GRPO).

*Gone on*: weights and every line of `metrics.jsonl` are those of the undisturbed run, bit for bit. *Lost*: steps that
were done again, from the fault back to the checkpoint that the next attempt began with. *Seconds*: from the fault to
the job's end, what was left of its training included; on two cores shared with other jobs.
"""
HEAD = "| stage | fault | end | cause | restarts | lost steps | last checkpoint | seconds |\n" + 8 * "|---" + "|\n"


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    gone_on = row["state"] == "Succeeded"
    restarts = ", ".join(f"{count} {cause}" for cause, count in row["restarts"].items()) or "none"
    lost = str(row["at"] - row["from"]) if gone_on else ""
    end = "gone on" if gone_on else row["state"]
    fault = row["fault"].replace("-", " ")
    return (
        f"| {row['stage']} | {fault} | {end} | {row['reason'] or 'not known'} | {restarts} | {lost} | {row['saved']} "
        f"| {row['seconds']} |\n"
    )


def main(results: Path, out: Path) -> None:
    """Sorted by stage, in the order of the tests."""
    rows = [json.loads(text) for text in results.read_text().splitlines()]
    rows.sort(key=lambda row: row["stage"] != "SFT")
    out.write_text(INTRODUCTION + "\n" + HEAD + "".join(line(row) for row in rows))
    print(f"{out}: {len(rows)} faults")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
