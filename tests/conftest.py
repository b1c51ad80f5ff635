"""What all tests share: the order in which groups are handed to pytest-xdist's workers."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole training jobs first: they take the longest, and the shorter groups fill the other worker meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
