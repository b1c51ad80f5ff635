"""Writes the report of the fault matrix: `python tests/e2e/fault_report.py RESULTS.jsonl docs/faults.md`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

INTRODUCTION = """# Faults

What happens to a job of two pods when something dies in the middle. Made by `make test-faults`
([test_fault_matrix.py](../tests/e2e/test_fault_matrix.py)): a real API server, the real training-operator, the operator
installed by its chart, real trainers, real signals; NaN, the error in the data and the exits are done by a hook in the
pod, and the node plays the kernel's part in an out-of-memory kill. A checkpoint is written every 8 steps (SFT) or 3
(GRPO, where most faults fall right behind one).

*Gone on*: the trained weights (an adapter's) and every line of `metrics.jsonl`, but for its times and memory, are those
of the undisturbed run, bit for bit. *Lost*: steps that were done again, from the fault back to the checkpoint that the
next attempt began with. *Seconds*: from the fault to the job's end, what was left of its training included; on two
cores shared with other jobs. *First*: who failed first, by `status.failure`.
"""
HEAD = (
    "| stage | fault | end | cause | first | restarts | lost steps | last checkpoint | seconds |\n" + 9 * "|---" + "|\n"
)

OUTAGES = """
## The API server away

Made by [test_api_faults.py](../tests/cluster/test_api_faults.py), with the operator's time constants at a tenth: a
proxy between operator and API server has the fault for so many seconds, while a job is created, one loses a pod, one
ends and one is deleted. *Seconds*: from the end of the fault until each of the first three stood as if nothing had
been, the restarted one running again. *Ends*: how often the operator's process ended itself and was started again.
"""
OUTAGE_HEAD = "| fault | for | seconds | ends | requests meanwhile |\n" + 5 * "|---" + "|\n"


def outage(row: dict[str, Any]) -> str:
    """One row of the second table."""
    return f"| {row['outage']} | {row['for']} s | {row['seconds']} | {row['ends']} | {row['requests']} |\n"


def first(failure: dict[str, Any]) -> str:
    """Who failed first, in a few words."""
    words = {"replica": "{}", "rank": "rank {}", "signal": "signal {}", "exitCode": "exit {}"}
    return ", ".join(word.format(failure[key]) for key, word in words.items() if key in failure)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    gone_on = row["state"] == "Succeeded"
    restarts = ", ".join(f"{count} {cause}" for cause, count in row["restarts"].items()) or "none"
    lost = str(row["at"] - row["from"]) if gone_on else ""
    end = "gone on" if gone_on else row["state"]
    fault = row["fault"].replace("-", " ")
    return (
        f"| {row['stage']} | {fault} | {end} | {row['reason'] or 'not known'} | {first(row['failure'])} | {restarts} "
        f"| {lost} | {row['saved']} | {row['seconds']} |\n"
    )


def main(results: Path, out: Path) -> None:
    """Sorted by stage, in the order of the tests."""
    told = [json.loads(text) for text in results.read_text().splitlines()]
    rows = sorted((row for row in told if "stage" in row), key=lambda row: row["stage"] != "SFT")
    outages = [row for row in told if "outage" in row]
    away = OUTAGES + "\n" + OUTAGE_HEAD + "".join(outage(row) for row in outages) if outages else ""
    out.write_text(INTRODUCTION + "\n" + HEAD + "".join(line(row) for row in rows) + away)
    print(f"{out}: {len(told)} faults")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
