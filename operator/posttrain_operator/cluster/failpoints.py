"""Failpoints: the process is killed by SIGKILL just before or just after the n-th write of a name. For tests only.

Switched on by POSTTRAIN_OPERATOR_FAILPOINT and absent otherwise: without the variable no gate exists and nothing is
counted. Its values:

    trace                        log every write that is reached, as `failpoint <name>#<n>:before` and `…:after`
    <name>#<n>:before|after      log them too, and die at this one

A name is that of `writes.Write`; n counts from 1 in this process, one count for each name. Writes that say nothing of
a job (leases, certificates, token reviews) have names too.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from collections.abc import Callable

from posttrain_operator.cluster.writes import Write

log = logging.getLogger(__name__)
TRACE = "trace"


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Failpoints:
    """A gate. `where`: the variable's value."""

    def __init__(self, where: str, die: Callable[[], None] = _die) -> None:
        self._where, self._die = where, die
        self._reached: Counter[str] = Counter()
        self._numbers: dict[int, str] = {}

    def before(self, write: Write) -> None:
        name = str(write)
        self._reached[name] += 1
        self._numbers[id(write)] = f"{name}#{self._reached[name]}"
        self._at(f"{self._numbers[id(write)]}:before")

    def after(self, write: Write) -> None:
        self._at(f"{self._numbers.pop(id(write))}:after")

    def _at(self, point: str) -> None:
        log.info("failpoint %s", point)
        if point == self._where:
            self._die()
