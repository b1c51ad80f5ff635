"""Which nodes of the group still breathe. A node that is gone without closing its connections is silent for ever: the
ranks of the others wait for it inside a collective, and cannot leave by themselves.

Each node's torchrun process beats once a second in the group's store; a rank could not, because it may hold Python's
lock for long while it saves. What it hears it leaves in a file for the launcher (silence.py).
"""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from posttrain_trainer import signs
from posttrain_trainer.signs import ENV_SIGNS
from posttrain_trainer.silence import write

BEAT_SECONDS = 1.0
_KEY = "posttrain/beats/"
_ADVANCES = "posttrain/advances"
_LEFT = -(1 << 40)
"""A node that ends says so: it is not silent, and its ranks have closed their connections."""


class Beats(threading.Thread):
    """Beats for `node` and listens to the other nodes of `count`, until the process ends or the store is gone."""

    def __init__(self, node: int, count: int, store: tuple[str, int], file: Path) -> None:
        super().__init__(daemon=True)
        self._advances = Advances(Path(os.environ[ENV_SIGNS]))
        self._node = node
        self._count = count
        self._address = store
        self._file = file
        self._ended = threading.Event()

    def run(self) -> None:
        """The thread. A closed connection is no silence: the ranks' own break too, and they end by that."""
        try:
            self._beat()
        except RuntimeError:  # DistNetworkError: node 0 has ended
            self._file.unlink(missing_ok=True)

    def end(self) -> None:
        """This node ends by itself."""
        self._ended.set()
        self.join(2 * BEAT_SECONDS)  # not longer: the store may be on a silent node

    def _beat(self) -> None:
        host, port = self._address
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(hours=1))
        heard = {node: (0, time.monotonic()) for node in range(self._count) if node != self._node}
        while not self._ended.wait(BEAT_SECONDS):
            store.add(f"{_KEY}{self._node}", 1)
            for node, (before, _) in heard.items():
                number = store.add(f"{_KEY}{node}", 0)
                if number != before or number <= 0:  # not yet there, or gone on purpose
                    heard[node] = (number, time.monotonic())
            write(self._file, {node: time.monotonic() - since for node, (_, since) in heard.items()})
            self._advances.share(store)
        store.add(f"{_KEY}{self._node}", _LEFT)


class Advances:
    """Tells the other nodes that a rank of this one got on, and marks it here where one of theirs did: one rank may
    write an export, or wait for a reward, for an hour, and the job does not stand still then."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._marks: dict[str, int] = {}
        self._known = 0

    def share(self, store: TCPStore) -> None:
        """Once a second. RuntimeError where the store is gone."""
        marks = signs.marks(self._folder, but=signs.OTHERS)
        moved, self._marks = marks != self._marks, marks
        number = store.add(_ADVANCES, int(moved))
        if number != self._known:
            self._known = number
            signs.touch(self._folder, signs.OTHERS)
