"""What a user's `kubectl get -w` would see, with the moment of it: the clock of every latency that is measured."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import operator_objects as objects
from benchmarks.operator_objects import Obj
from devcluster.api import Client, Informer

Holds = Callable[[Obj], bool]
JOB, CHILD = "job", "child"


class Seen:
    """Watches the jobs and PyTorchJobs of one namespace."""

    def __init__(self, client: Client, namespace: str) -> None:
        paths = {JOB: objects.JOBS, CHILD: objects.CHILDREN}
        self._waiting: defaultdict[tuple[str, str], list[tuple[Holds, asyncio.Future[float]]]] = defaultdict(list)
        self._informers = {
            kind: Informer(client, path.format(namespace), {}, self._heard(kind)) for kind, path in paths.items()
        }
        self._namespace = namespace
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> Seen:
        """Returns once both lists are read."""
        self._tasks = [asyncio.create_task(informer.run()) for informer in self._informers.values()]
        await asyncio.gather(*(informer.synced.wait() for informer in self._informers.values()))
        return self

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def expect(self, kind: str, name: str, holds: Holds = lambda _: True) -> asyncio.Future[float]:
        """The moment (time.perf_counter) of the next event of the object for which `holds`. Ask before you act."""
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting[kind, name].append((holds, future))
        return future

    def get(self, kind: str, name: str) -> Obj:
        """The object as it was last seen; KeyError where it was not."""
        return self._informers[kind].store[f"{self._namespace}/{name}"]

    def all(self, kind: str) -> Mapping[str, Obj]:
        """All of them, by namespace/name."""
        return self._informers[kind].store

    def _heard(self, kind: str) -> Callable[[str, Obj], None]:
        def changed(event: str, obj: Obj) -> None:
            moment, key = time.perf_counter(), (kind, obj["metadata"]["name"])
            if event == "DELETED" or key not in self._waiting:
                return
            rest = [each for each in self._waiting.pop(key) if not _answered(each, obj, moment)]
            if rest:
                self._waiting[key] = rest

        return changed


def _answered(waiting: tuple[Holds, asyncio.Future[float]], obj: Obj, moment: float) -> bool:
    holds, future = waiting
    if future.done():
        return True
    if not holds(obj):
        return False
    future.set_result(moment)
    return True


def state(*wanted: str) -> Holds:
    """A job whose status.state is one of these."""
    return lambda obj: status(obj).get("state") in wanted


def reason(*wanted: str) -> Holds:
    """A job whose status.reason is one of these."""
    return lambda obj: status(obj).get("reason") in wanted


def has_backend(obj: Obj) -> bool:
    """A job whose status names its child."""
    return "backend" in status(obj)


def status(obj: Mapping[str, Any]) -> Mapping[str, Any]:
    """The status; empty where there is none."""
    return obj.get("status") or {}
