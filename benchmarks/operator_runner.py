"""The status runner: plays kubelet and training-operator for jobs whose pods run nothing.

A small controller of its own beside the real API server: it makes a PyTorchJob's pods, says that they run, recreates
those that are deleted, and ends those whose fate says so, with the writes that the real ones were seen to make. The
benchmark runs it as a process (`python -m benchmarks.operator_runner`), the soak inside its own.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from benchmarks import operator_objects as objects
from benchmarks.operator_access import access
from benchmarks.operator_objects import Obj
from devcluster.api import MERGE, ApiError, Client, Informer

AT_ONCE = 32
_AGAIN = 0.05
_LATER = frozenset({404, 409, 422, 429, 500, 503, 504})


@dataclass(frozen=True)
class Ending:
    """How one pod of an attempt ends, `after` seconds once all of them run."""

    role: str
    index: int
    code: int
    message: str = ""
    reason: str = ""
    after: float = 0.0


Fate = Callable[[str, int], tuple[Ending, ...]]
"""(name of the job, number of the attempt) -> the ends of its pods; none: they run for ever."""


def endless(_: str, __: int) -> tuple[Ending, ...]:
    """Every job runs for ever."""
    return ()


class Runner:
    """Plays for one namespace. `attempts` counts complete sets of new pods by the name of the job."""

    def __init__(self, client: Client, namespace: str, fate: Fate = endless) -> None:
        self._client, self._fate = client, fate
        self._pods_path, self._children_path = objects.PODS.format(namespace), objects.CHILDREN.format(namespace)
        self._children: dict[str, Obj] = {}
        self._pods: defaultdict[str, dict[str, Obj]] = defaultdict(dict)
        self._dirty: set[str] = set()
        self._working: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._seen: dict[str, frozenset[str]] = {}
        self._limit = asyncio.Semaphore(AT_ONCE)
        self._broken: asyncio.Future[None]
        self.attempts: dict[str, int] = {}

    async def run(self) -> None:
        """For ever."""
        informers = (
            Informer(self._client, self._children_path, objects.MANAGED, self._child_changed),
            Informer(self._client, self._pods_path, objects.MANAGED, self._pod_changed),
        )
        self._broken = asyncio.get_running_loop().create_future()
        async with asyncio.TaskGroup() as group:
            for informer in informers:
                group.create_task(informer.run())
            group.create_task(self._until_broken(self._broken))

    async def _until_broken(self, broken: asyncio.Future[None]) -> None:
        """Raises what ended the work on any job: a runner that plays only half of its part would spoil every figure."""
        await broken

    def _worked(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._broken.done():
            self._broken.set_exception(error)

    def _child_changed(self, kind: str, child: Obj) -> None:
        name = child["metadata"]["name"]
        if kind == "DELETED":
            self._children.pop(name, None)
        else:
            self._children[name] = child
        self._touch(name)

    def _pod_changed(self, kind: str, pod: Obj) -> None:
        name, job = pod["metadata"]["name"], pod["metadata"]["labels"].get("training.kubeflow.org/job-name")
        if job is None:
            return
        known = self._pods[job].get(name)
        if kind == "DELETED":
            if known and known["metadata"]["uid"] == pod["metadata"]["uid"]:
                del self._pods[job][name]
        elif not known or _version(pod) > _version(known):
            self._pods[job][name] = pod
        self._touch(job)

    def _touch(self, name: str) -> None:
        self._dirty.add(name)
        if name not in self._working:
            self._working[name] = asyncio.create_task(self._work(name))
            self._working[name].add_done_callback(self._worked)

    async def _work(self, name: str) -> None:
        try:
            while name in self._dirty:
                self._dirty.discard(name)
                async with self._limit:
                    await self._settle(name)
        finally:
            del self._working[name]

    async def _settle(self, name: str) -> None:
        """One look at a job. After a lost race, or where the server is too busy, it is looked at again."""
        try:
            await self._look(name)
        except (ApiError, aiohttp.ClientError, TimeoutError) as error:
            if isinstance(error, ApiError) and error.code not in _LATER:
                raise
            await asyncio.sleep(_AGAIN)
            self._dirty.add(name)
        if not self._pods[name]:
            del self._pods[name]

    async def _look(self, name: str) -> None:
        pods = list(self._pods[name].values())
        for pod in pods:
            if "deletionTimestamp" in pod["metadata"]:
                await self._bury(pod)
        child = self._children.get(name)
        if child is None or "deletionTimestamp" in child["metadata"]:
            return
        if objects.holds(child, "Succeeded") or objects.holds(child, "Failed"):
            await self._stop([pod for pod in pods if _phase(pod) in ("Pending", "Running")])
        elif child["spec"]["runPolicy"].get("suspend"):
            await self._suspend(child, pods)
        else:
            await self._train(child)

    async def _suspend(self, child: Obj, pods: list[Obj]) -> None:
        await self._stop(pods)
        if not objects.holds(child, "Suspended"):
            await self._say(child, objects.condition("Suspended"))

    async def _train(self, child: Obj) -> None:
        name = child["metadata"]["name"]
        wanted = {objects.pod_name(child, *replica): replica for replica in objects.replicas(child)}
        for pod, replica in wanted.items():
            if pod not in self._pods[name]:
                await self._make(child, *replica)
        for pod in [self._pods[name].get(pod) for pod in wanted]:
            if pod is not None and await self._advanced(child, pod):
                return
        mine = [self._pods[name][pod] for pod in wanted if pod in self._pods[name]]
        if len(mine) == len(wanted) and all(_phase(pod) == "Running" for pod in mine):
            await self._all_run(child, mine)

    async def _make(self, child: Obj, role: str, index: int) -> None:
        try:
            self._pod_changed("MODIFIED", await self._client.post(self._pods_path, objects.pod_of(child, role, index)))
        except ApiError as error:
            if error.code not in (404, 409):  # it exists, or the PyTorchJob went: the watch says which
                raise

    async def _advanced(self, child: Obj, pod: Obj) -> bool:
        """What follows from one pod's phase; True where it decides about all the others."""
        phase, code = _phase(pod), _exit_code(pod)
        if "deletionTimestamp" in pod["metadata"]:
            return False
        if phase == "Pending":
            self._pod_changed("MODIFIED", await self._tell(pod, objects.running()))
        elif phase == "Succeeded" and _role(pod) == "master":
            await self._say(child, objects.condition("Running", "False"), objects.condition("Succeeded"))
            return True
        elif phase == "Failed" and code is not None and 0 < code < 128:
            await self._say(child, objects.condition("Running", "False"), objects.condition("Failed"))
            return True
        elif phase == "Failed":
            await self._gone(pod)
        return False

    async def _all_run(self, child: Obj, pods: list[Obj]) -> None:
        if not objects.holds(child, "Running"):
            await self._say(child, objects.condition("Running"))
        name, now = child["metadata"]["name"], frozenset(pod["metadata"]["uid"] for pod in pods)
        if now & self._seen.get(name, frozenset()):
            return
        self._seen[name] = now
        self.attempts[name] = self.attempts.get(name, 0) + 1
        for ending in self._fate(name, self.attempts[name]):
            self._begin(child, ending, pods)

    def _begin(self, child: Obj, ending: Ending, pods: list[Obj]) -> None:
        name = objects.pod_name(child, ending.role, ending.index)
        pod = next(each for each in pods if each["metadata"]["name"] == name)
        task = asyncio.create_task(self._end(pod, ending))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, pod: Obj, ending: Ending) -> None:
        await asyncio.sleep(ending.after)
        while self._runs(pod):
            try:
                await self._tell(pod, objects.ended(ending.code, ending.message, ending.reason))
                return
            except ApiError as error:
                if error.code in (404, 409):  # it was deleted meanwhile: its end is another
                    return
            except (aiohttp.ClientError, TimeoutError):
                pass  # the server is too busy: again
            await asyncio.sleep(_AGAIN)

    def _runs(self, pod: Obj) -> bool:
        """Whether it is still there and runs."""
        known = self._pods[pod["metadata"]["labels"]["training.kubeflow.org/job-name"]].get(pod["metadata"]["name"])
        return bool(known and known["metadata"]["uid"] == pod["metadata"]["uid"] and _phase(known) == "Running")

    async def _stop(self, pods: list[Obj]) -> None:
        for pod in pods:
            if "deletionTimestamp" not in pod["metadata"]:
                await self._client.delete(f"{self._pods_path}/{pod['metadata']['name']}")

    async def _bury(self, pod: Obj) -> None:
        """The kubelet's part of a deletion: the container's end, then the last word."""
        if _phase(pod) in ("Pending", "Running"):
            await self._tell(pod, objects.ended(143, "SIGTERM"))
        await self._gone(pod)

    async def _gone(self, pod: Obj) -> None:
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
        await self._client.delete(f"{self._pods_path}/{pod['metadata']['name']}", options)

    async def _tell(self, pod: Obj, status: Obj) -> Obj:
        body = {**status, "metadata": {"uid": pod["metadata"]["uid"]}}
        return await self._client.patch(f"{self._pods_path}/{pod['metadata']['name']}/status", body, MERGE)

    async def _say(self, child: Obj, *conditions: Obj) -> None:
        body = objects.child_status(*conditions)
        told = await self._client.patch(f"{self._children_path}/{child['metadata']['name']}/status", body, MERGE)
        self._children[child["metadata"]["name"]] = told


def _phase(pod: Mapping[str, Obj]) -> str:
    return str((pod.get("status") or {}).get("phase", "Pending"))


def _role(pod: Obj) -> str:
    return str(pod["metadata"]["labels"]["training.kubeflow.org/replica-type"])


def _exit_code(pod: Obj) -> int | None:
    for container in pod["status"].get("containerStatuses") or ():
        if found := container["state"].get("terminated"):
            return int(found["exitCode"])
    return None


def _version(obj: Obj) -> int:
    return int(obj["metadata"]["resourceVersion"])


async def _main(folder: Path, namespace: str) -> None:
    client = access(folder)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    runner, told = asyncio.create_task(Runner(client, namespace).run()), asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([runner, told], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        runner.cancel()
        await client.close()


def main() -> None:
    """Plays until SIGTERM."""
    parser = argparse.ArgumentParser("python -m benchmarks.operator_runner", description=__doc__)
    parser.add_argument("state", type=Path, help="state folder of the devcluster")
    parser.add_argument("namespace", help="whose PyTorchJobs to play for")
    options = parser.parse_args()
    asyncio.run(_main(options.state, options.namespace))


if __name__ == "__main__":
    main()
