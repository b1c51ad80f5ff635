"""The real helm renders the chart: a template engine of our own would test itself."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster import binaries

CHART = Path(__file__).parents[2] / "helm" / "posttrain-operator"
NAMESPACE = "posttrain-system"

Object = dict[str, Any]


@pytest.fixture(scope="session")
def helm() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs helm with these arguments; builds it first where `python -m devcluster build` has not."""
    binaries.ensure(["helm"])
    program = str(binaries.binary("helm"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=60)

    return run


@pytest.fixture(scope="session")
def render(helm: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., list[Object]]:
    """Renders the chart with `--set` pairs (JSON values) and returns its objects; fails with helm's own words."""

    def objects(*pairs: str) -> list[Object]:
        sets = [word for pair in pairs for word in ("--set-json", pair)]
        done = helm("template", "release", str(CHART), "--namespace", NAMESPACE, *sets)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return objects


@pytest.fixture(scope="session")
def default(render: Callable[..., list[Object]]) -> list[Object]:
    """The chart with its default values."""
    return render()
