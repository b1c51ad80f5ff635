"""metrics.jsonl is cut back to the step that is resumed; sums and phases are taken once."""

from __future__ import annotations

from pathlib import Path

import torch

from posttrain_trainer.metrics import MetricsFile, Phases, Totals, read_metrics


def test_lines_after_the_checkpoint_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 6):
        file.write(step, {"loss": step / 3})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 6, "lo')
    file = MetricsFile(path, 3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    file.write(4, {"loss": 0.5})
    file.close()
    assert read_metrics(path)[-1] == {"step": 4, "loss": 0.5}
    assert read_metrics(path)[0] == {"step": 1, "loss": 1 / 3}
    MetricsFile(path, 0).close()
    assert read_metrics(path) == []


def test_totals_and_phases() -> None:
    totals = Totals()
    assert totals.read() == ((), [])
    totals.add({"loss": torch.tensor(1.5, requires_grad=True), "hits": torch.tensor(2.0)})
    totals.add({"loss": torch.tensor(0.5), "hits": torch.tensor(1.0)})
    assert totals.read() == (("loss", "hits"), [2.0, 3.0])
    phases = Phases()
    for _ in range(2):
        with phases.measure("data"):
            pass
    assert phases.seconds("data") > 0
    assert set(phases.take()) == {"time/data"}
    assert phases.take() == {}
