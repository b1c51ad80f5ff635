"""What the tests on a real API server share: one control plane with the CRD, for as long as the test process lives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.crd_rig import Rig, crd_rig


@pytest.fixture(scope="session")
def crd_server() -> Iterator[Rig]:
    """Etcd, API server and the CRD; every test uses job names of its own."""
    with crd_rig() as rig:
        yield rig
