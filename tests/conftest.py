"""What all tests share: the order in which groups are handed to pytest-xdist's workers, and patience with them."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("busy machine", deadline=None, max_examples=60)
settings.load_profile("busy machine")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole training jobs first: they take the longest, and the shorter groups fill the other worker meanwhile."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
