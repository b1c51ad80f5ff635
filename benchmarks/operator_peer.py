"""The real training-operator in the same cluster: what the Go controller beside us needs for its own part.

Its part begins where ours ends: a PyTorchJob exists, pods are to be made. It runs as devcluster runs it, but without
its webhook, which would cost our own creations time. Started by `operator_bench` when the operator has ended.
"""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
import time
from collections import defaultdict

from benchmarks import operator_objects as objects
from benchmarks.operator_access import namespace
from benchmarks.operator_lives import IN_FLIGHT, Template
from benchmarks.operator_objects import Obj
from benchmarks.operator_process import cpu_seconds, end, free_port, memory, start
from benchmarks.operator_report import Figures, bar, spread
from benchmarks.operator_world import World
from devcluster import binaries, containers, kubeflow
from devcluster.api import ApiError, Informer

NAMESPACE = "peer"
_WEBHOOK = "validator.training-operator.kubeflow.org"


class Pods:
    """When the pods of each PyTorchJob were first seen."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._moments: defaultdict[str, list[float]] = defaultdict(list)
        self._done: dict[str, asyncio.Future[float]] = {}

    def expect(self, name: str) -> asyncio.Future[float]:
        """The moment of its first pod, known once all are there."""
        self._done[name] = asyncio.get_running_loop().create_future()
        return self._done[name]

    def heard(self, kind: str, pod: Obj) -> None:
        name = pod["metadata"]["labels"].get("training.kubeflow.org/job-name", "")
        if kind != "ADDED" or name not in self._done:
            return
        self._moments[name].append(time.perf_counter())
        if len(self._moments[name]) == self._wanted and not self._done[name].done():
            self._done[name].set_result(self._moments[name][0])


class Peer:
    """The training-operator's process."""

    def __init__(self, world: World) -> None:
        self._world, self._health = world, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    async def begin(self) -> float:
        """Seconds until it is ready."""
        begun = time.perf_counter()
        await self._objects()
        serving = self._world.folder / "training-operator-certs"
        serving.mkdir(exist_ok=True)
        environ = {**os.environ, "MY_POD_NAMESPACE": kubeflow.NAMESPACE}
        self._process = start(self._command(str(serving)), self._world.folder / "training-operator.log", environ)
        path, ready = f"/api/v1/namespaces/{kubeflow.NAMESPACE}/secrets/{kubeflow.SECRET}", False
        while time.perf_counter() - begun < 300:
            if self._process.poll() is not None:
                raise RuntimeError(f"training-operator ended; see {self._world.folder}/training-operator.log")
            for name, value in ((await self._world.client.get(path)).get("data") or {}).items():
                (serving / name).write_bytes(base64.b64decode(value))
            if ready := await self._ready():
                break
            await asyncio.sleep(0.2)
        if not ready:
            raise TimeoutError("training-operator was not ready in 300 s")
        return time.perf_counter() - begun

    def end(self) -> None:
        if self._process:
            end(self._process)

    async def measure(self, template: Template, lives: int, count: int) -> Figures:
        """Its latencies one at a time, and a burst."""
        assert self._process is not None
        # bwrap is the process that was started; the operator is its child.
        pid = _last_child(self._process.pid)
        await _calm(pid)
        pods = Pods(2)
        watch = Informer(self._world.client, objects.PODS.format(NAMESPACE), {}, pods.heard)
        following = asyncio.create_task(watch.run())
        await watch.synced.wait()
        try:
            return await self._measured(pid, pods, template, (lives, count))
        finally:
            following.cancel()

    async def _measured(self, pid: int, pods: Pods, template: Template, sizes: tuple[int, int]) -> Figures:
        lives, count = sizes
        alone = []
        with bar("training-operator, one by one", lives) as tick:
            for number in range(lives):
                alone.append(await self._one(pods, template, f"one-{number}"))
                tick()
                await asyncio.sleep(0.05)
        spent, begun, limit = cpu_seconds(pid), time.perf_counter(), asyncio.Semaphore(IN_FLIGHT)

        async def one(number: int) -> float:
            seconds = await self._one(pods, template, f"many-{number}", limit)
            tick()
            return seconds

        with bar("training-operator, a burst", count) as tick:
            many = await asyncio.gather(*(one(number) for number in range(count)))
        return {
            **spread("PyTorchJob → pod, ms", [1000 * each for each in alone]),
            **spread("burst: PyTorchJob → pod, ms", [1000 * each for each in many]),
            "burst: jobs/s": count / (time.perf_counter() - begun),
            "burst: CPU of a job, ms": 1000 * (cpu_seconds(pid) - spent) / count,
            "RSS, MiB": memory(pid)[0],
            "most RSS, MiB": memory(pid)[1],
        }

    async def _one(self, pods: Pods, template: Template, name: str, limit: asyncio.Semaphore | None = None) -> float:
        """Seconds from the creation's request to its first pod; returns when both are there."""
        child = template.of(template.child, NAMESPACE, name, template.uid)
        meta = {"name": name, "namespace": NAMESPACE, "labels": child["metadata"]["labels"]}
        seen = pods.expect(name)
        async with limit or asyncio.Semaphore(1):
            begun = time.perf_counter()
            await self._world.client.post(objects.CHILDREN.format(NAMESPACE), {**child, "metadata": meta})
        return await asyncio.wait_for(seen, 300) - begun

    async def _objects(self) -> None:
        """What it expects to find: its namespace, its certificate's Secret, a webhook (one that is asked nothing)."""
        namespace(self._world.cluster, NAMESPACE, objects.claim("runs"))
        secret = {"metadata": {"name": kubeflow.SECRET, "namespace": kubeflow.NAMESPACE}}
        space = {"metadata": {"name": kubeflow.NAMESPACE}}
        hooks = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
        wanted = (
            ("/api/v1/namespaces", space),
            (f"/api/v1/namespaces/{kubeflow.NAMESPACE}/secrets", secret),
            (hooks, {"metadata": {"name": _WEBHOOK}, "webhooks": []}),
        )
        for path, body in wanted:
            try:
                await self._world.client.post(path, body)
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise

    async def _ready(self) -> bool:
        try:
            async with self._world.http.get(f"http://127.0.0.1:{self._health}/readyz") as answer:
                return answer.status == 200
        except OSError:  # it does not listen yet
            return False

    def _command(self, serving: str) -> list[str]:
        folder = self._world.folder
        template = folder / "init-pytorch.yaml"
        template.write_text(kubeflow.INIT_TEMPLATE)
        root, binary = str(folder), str(binaries.binary("training-operator"))
        jail = [containers.bwrap_path(), "--die-with-parent", "--dev-bind", "/", "/", "--tmpfs", "/tmp"]
        jail += ["--bind", root, root, "--ro-bind", binary, binary, "--bind", serving, kubeflow.SERVING]
        kubeconfig = str(self._world.cluster.kubeconfig)
        return [
            *jail,
            *("--ro-bind", kubeconfig, kubeconfig, "--", binary, f"--kubeconfig={kubeconfig}"),
            "--enable-scheme=pytorchjob",
            "--kube-api-qps=200",
            "--kube-api-burst=300",
            "--controller-threads=8",
            f"--webhook-server-port={free_port()}",
            f"--metrics-bind-address=127.0.0.1:{free_port()}",
            f"--health-probe-bind-address=127.0.0.1:{self._health}",
            "--pytorch-init-container-image=init",
            f"--pytorch-init-container-template-file={template}",
            "--zap-log-level=error",
        ]


def _last_child(pid: int) -> int:
    """The end of a chain of single children."""
    with open(f"/proc/{pid}/task/{pid}/children") as handle:
        children = handle.read().split()
    return _last_child(int(children[0])) if children else pid


async def _calm(pid: int) -> None:
    """Until it has looked at all that is there."""
    while True:
        before = cpu_seconds(pid)
        await asyncio.sleep(2)
        if cpu_seconds(pid) - before < 0.1:
            return


async def measured(world: World, template: Template, lives: int, count: int) -> Figures:
    """The whole part: started, measured, ended."""
    peer = Peer(world)
    try:
        seconds = await peer.begin()
        return {"until ready, s": seconds, **await peer.measure(template, lives, count)}
    finally:
        peer.end()
