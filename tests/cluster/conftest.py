"""What the tests on a real API server share: control planes, for as long as the test process lives, and an operator."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest
from operator_kit import Operator, World, operator, prepare

from devcluster.testing import Cluster, control_plane
from tests.cluster.crd_rig import Rig, crd_rig


@pytest.fixture(scope="session")
def crd_server() -> Iterator[Rig]:
    """Etcd, API server and the CRD; every test uses job names of its own."""
    with crd_rig() as rig:
        yield rig


@pytest.fixture(scope="session")
def plane() -> Iterator[Cluster]:
    """etcd, the API server, the garbage collector; both CRDs and the chart's rights."""
    with control_plane(audit=True) as cluster:
        prepare(cluster)
        yield cluster


@pytest.fixture(scope="module")
def running(plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """An operator at a tenth of the time constants."""
    with operator(plane, tmp_path_factory.mktemp("operator")) as process:
        yield process
        assert process.process.poll() is None, process.log.read_text()[-3000:]


@pytest.fixture
def world(plane: Cluster) -> World:
    """A namespace of its own: nothing of other tests is in it."""
    return World(plane, f"team-{uuid.uuid4().hex[:8]}")
