"""Groups of pytest-xdist hold: some pairs of versions ignore them without a word; then each worker starts a cluster."""

import os

import pytest


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="only where tests are spread over workers")
@pytest.mark.xdist_group("groups")
def test_the_scheduler_is_told_the_group(request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith("@groups")
