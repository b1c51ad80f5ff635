"""Every job in examples/ is valid, and the smallest needs nothing but what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain_cli.__main__ import main
from posttrain_cli.manifests import load_documents

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {document.value["kind"] for document in load_documents(path.read_text())}
    if "PostTrainingJob" not in kinds:
        assert kinds == {"PersistentVolumeClaim"}
        return
    assert main(["validate", str(path)]) == 0, capsys.readouterr().out


def test_smallest_job_is_twelve_lines_at_most() -> None:
    lines = [line for line in (EXAMPLES / "02-sft-lora.yaml").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) <= 12


def test_numbered_without_gaps() -> None:
    numbers = [int(path.name[:2]) for path in sorted(EXAMPLES.glob("*.yaml"))]
    assert numbers == list(range(1, len(numbers) + 1))
