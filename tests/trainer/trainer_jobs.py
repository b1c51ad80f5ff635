"""What forked ranks run in tests. A module of its own, because the fork server imports it before it forks."""

from __future__ import annotations


def work() -> None:
    """A worker as torchrun would start it; leaves with its own exit code."""
    from posttrain_trainer.worker import main

    main()
