"""Property tests of the trainer run on a machine shared with its own ranks: no deadline on a single example."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("trainer", deadline=None, max_examples=60)
settings.load_profile("trainer")
