"""One job at a time, and many at once: the latencies that a user feels, and the same writes by a bare client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import operator_objects as objects
from benchmarks.operator_objects import Obj
from benchmarks.operator_seen import CHILD, JOB, Seen, has_backend, reason, state
from devcluster.api import APPLY, MERGE, Client
from posttrain_api import names

IN_FLIGHT = 32
_PATIENCE = 120.0
_SERVERS_OWN = ("uid", "resourceVersion", "creationTimestamp", "generation", "managedFields")


@dataclass(frozen=True)
class Life:
    """Seconds: job applied -> child seen; last pod ready -> status says so; master ended -> status says Succeeded."""

    created: float
    ready: float
    succeeded: float


@dataclass(frozen=True)
class Template:
    """Everything that was written for one job, as JSON texts with its names and uid inside. `child` may be empty."""

    namespace: str
    name: str
    uid: str
    maps: tuple[str, ...]
    child: str
    status: str

    def of(self, text: str, namespace: str, name: str, uid: str) -> Obj:
        """The same object for another job."""
        made: Obj = json.loads(text.replace(self.uid, uid).replace(self.name, name).replace(self.namespace, namespace))
        return made


class Hands:
    """A user, a kubelet and a training-operator in one namespace, with a watch that says when."""

    def __init__(self, client: Client, seen: Seen, namespace: str) -> None:
        self.client, self.seen, self.namespace = client, seen, namespace
        self.jobs, self.children = objects.JOBS.format(namespace), objects.CHILDREN.format(namespace)
        self.pods, self.maps = objects.PODS.format(namespace), objects.CONFIG_MAPS.format(namespace)

    async def live(self, name: str) -> Life:
        """One whole life, alone."""
        appeared = self.seen.expect(CHILD, name)
        begun = time.perf_counter()
        await self.client.post(self.jobs, objects.job(name, self.namespace))
        created = await _soon(appeared) - begun
        pods = await self._pods(name)
        noticed = self.seen.expect(JOB, name, reason("Preparing", "Running", "Training"))
        for pod in reversed(pods):
            begun = time.perf_counter()
            await self._tell(pod, objects.running())
        ready = await _soon(noticed) - begun
        finished = self.seen.expect(JOB, name, state("Succeeded"))
        await self._tell(pods[1], objects.ended(0))
        begun = time.perf_counter()
        await self._tell(pods[0], objects.ended(0, objects.success()))
        succeeded = await _soon(finished) - begun
        body = objects.child_status(objects.condition("Succeeded"))
        await self.client.patch(f"{self.children}/{name}/status", body, MERGE)
        return Life(created, ready, succeeded)

    async def _pods(self, name: str) -> list[str]:
        child = self.seen.get(CHILD, name)
        made = [objects.pod_of(child, *replica) for replica in objects.replicas(child)]
        for pod in made:
            await self.client.post(self.pods, pod)
        return [pod["metadata"]["name"] for pod in made]

    async def _tell(self, pod: str, status: Obj) -> None:
        await self.client.patch(f"{self.pods}/{pod}/status", status, MERGE)

    async def template(self, name: str, finish: bool = False, suspend: bool = False) -> Template:
        """What the operator writes for a job until it has started, or has finished, or is suspended."""
        if finish:
            await self.live(name)
        else:
            written = self.seen.expect(JOB, name, state("Suspended") if suspend else has_backend)
            await self.client.post(self.jobs, objects.job(name, self.namespace, suspend=suspend))
            await _soon(written)
        return await self._taken(name)

    async def _taken(self, name: str) -> Template:
        job, child = self.seen.get(JOB, name), self.seen.all(CHILD).get(f"{self.namespace}/{name}")
        found = (await self.client.get(self.maps, labelSelector=f"{names.LABEL_JOB_NAME}={name}"))["items"]
        maps = tuple(json.dumps({**each, "apiVersion": "v1", "kind": "ConfigMap", **_plain(each)}) for each in found)
        made = json.dumps({**child, **_plain(child), "status": {}}) if child else ""
        return Template(self.namespace, name, job["metadata"]["uid"], maps, made, json.dumps(job["status"]))

    async def burst(self, prefix: str, count: int, tick: Callable[[], object]) -> tuple[float, list[float]]:
        """Applies so many jobs at once. (seconds until the last has its child and its status, seconds of each until
        its child was seen)."""
        limit, begun = asyncio.Semaphore(IN_FLIGHT), time.perf_counter()

        async def one(name: str) -> tuple[float, float]:
            child, started = self.seen.expect(CHILD, name), self.seen.expect(JOB, name, has_backend)
            async with limit:
                applied = time.perf_counter()
                await self.client.post(self.jobs, objects.job(name, self.namespace))
            times = await _soon(child) - applied, await _soon(started)
            tick()
            return times

        found = await asyncio.gather(*(one(f"{prefix}-{number}") for number in range(count)))
        return max(done for _, done in found) - begun, [latency for latency, _ in found]

    async def bare(self, prefix: str, count: int, template: Template, tick: Callable[[], object]) -> float:
        """The same writes without an operator; the seconds."""
        limit, begun = asyncio.Semaphore(IN_FLIGHT), time.perf_counter()

        async def one(name: str) -> None:
            async with limit:
                await self.write(name, template)
            tick()

        await asyncio.gather(*(one(f"{prefix}-{number}") for number in range(count)))
        return time.perf_counter() - begun

    async def write(self, name: str, template: Template) -> None:
        """A job, and all that the operator wrote for the template's."""
        job = await self.client.post(self.jobs, objects.job(name, self.namespace))
        uid = job["metadata"]["uid"]
        for text in template.maps:
            await self.client.post(self.maps, template.of(text, self.namespace, name, uid))
        child = await self.client.post(self.children, template.of(template.child, self.namespace, name, uid))
        status = template.of(template.status, self.namespace, name, uid)
        await self.say(job, {**status, "backend": {**status["backend"], "uid": child["metadata"]["uid"]}})

    async def say(self, job: Obj, status: Obj) -> None:
        """Writes a job's status as the operator does."""
        meta = {name: job["metadata"][name] for name in ("name", "namespace", "resourceVersion")}
        body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": meta, "status": status}
        path = f"{self.jobs}/{meta['name']}/status"
        await self.client.patch(path, json.dumps(body), APPLY, fieldManager=names.STATUS_MANAGER, force="true")


def _plain(obj: Obj) -> Obj:
    return {"metadata": {name: value for name, value in obj["metadata"].items() if name not in _SERVERS_OWN}}


async def _soon(future: asyncio.Future[float]) -> float:
    return await asyncio.wait_for(future, _PATIENCE)
