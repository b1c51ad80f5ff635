"""Every job that the examples and the documents show is valid, and every command of ours that they name exists."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from posttrain_api.job import check
from posttrain_cli.__main__ import main, make_parser
from posttrain_cli.manifests import load_documents

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(ROOT)), text)
        for path in DOCUMENTS
        for kind, text in FENCED.findall(path.read_text())
        if kind == language
    ]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "PostTrainingJob" in path.read_text():
        assert main(["validate", "--strict", str(path)]) == 0, capsys.readouterr().out
    else:
        assert all(document["kind"] for document in yaml.safe_load_all(path.read_text()))


def test_jobs_in_documents_are_valid() -> None:
    jobs = [(path, text) for path, text in blocks("yaml") if "kind: PostTrainingJob" in text]
    assert jobs
    for path, text in jobs:
        for document in load_documents(text):
            assert check(document.value) == (), f"{path}: {check(document.value)}"


def commands() -> list[str]:
    """Lines of shell blocks, continued lines joined."""
    texts = (text.replace("\\\n", " ") for _, text in blocks("sh"))
    return [line.strip() for text in texts for line in text.splitlines() if line.strip()]


def test_commands_of_ours_parse() -> None:
    ours = [line for line in commands() if line.startswith("posttrain ")]
    assert ours
    for line in ours:
        make_parser("posttrain").parse_args(line.split("#")[0].split()[1:])


def test_make_targets_exist() -> None:
    named = {match for path in DOCUMENTS for match in re.findall(r"`?\bmake ([a-z][a-z-]+)", code(path))}
    known = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= known


def code(path: Path) -> str:
    """Shell blocks and inline code of a document."""
    text = path.read_text()
    return "\n".join([*(body for _, body in FENCED.findall(text)), *re.findall(r"`[^`\n]+`", text)])


def test_chart_values_named_in_commands_exist() -> None:
    values = yaml.safe_load((ROOT / "helm" / "posttrain-operator" / "values.yaml").read_text())
    for dotted in re.findall(r"--set ([\w.]+)=", "\n".join(commands())):
        node = values
        for key in dotted.split("."):
            assert key in node, dotted
            node = node[key]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_nothing_of_the_example_is_ignored_by_git() -> None:
    ignored = subprocess.run(["git", "check-ignore", *map(str, EXAMPLES)], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout == ""
