"""One cluster for all end-to-end tests, with the real training-operator and our operator installed by its chart.

POSTTRAIN_E2E_STATE=<folder> keeps the cluster between runs (and uses the one that runs there): for writing tests.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_cluster import images, install
from e2e_kit import OPERATOR_NAMESPACE, PAIRS, RELEASE, TEXTS, Bench

from devcluster import launcher
from devcluster.state import ClusterSpec, running_pid
from devcluster.testing import Cluster, full_cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A job on a busy machine takes its time; only a test that fails takes all of it."""
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.timeout(700))


@contextlib.contextmanager
def kept(state: Path) -> Iterator[Cluster]:
    spec = ClusterSpec("e2e", str(state), images=images())
    if running_pid(spec) is None:
        launcher.start(spec, print)
    yield Cluster(spec)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster with the operator in it."""
    state = os.environ.get("POSTTRAIN_E2E_STATE")
    with kept(Path(state)) if state else full_cluster(images=images()) as running:
        install(running)
        if state:  # the code may have changed since it was started
            running.kubectl("-n", OPERATOR_NAMESPACE, "rollout", "restart", f"deployment/{RELEASE}")
            install(running)
        yield running


@pytest.fixture(scope="session")
def reinstall(cluster: Cluster) -> Callable[..., None]:
    """Changes chart values of the running operator."""
    return lambda *settings: install(cluster, *settings)


@pytest.fixture(scope="module")
def bench(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """A namespace of this module's own, with a claim `runs` that holds texts and pairs; deleted with all its jobs."""
    name = request.module.__name__.removeprefix("test_").replace("_", "-")
    made = Bench(cluster, name)
    cluster.kubectl("delete", "namespace", name, "--ignore-not-found")
    cluster.kubectl("create", "namespace", name)
    made.claim("runs")
    made.rows("data/text.jsonl", TEXTS)
    made.rows("data/pairs.jsonl", PAIRS)
    yield made
    if not os.environ.get("POSTTRAIN_E2E_STATE"):
        cluster.kubectl("delete", "namespace", name, "--wait=false")
