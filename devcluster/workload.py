"""What a full cluster has beside its control plane: services, storage, training-operator, nodes, faults.

Called by the supervisor. Everything here needs the private network; without it a cluster is a control plane only.
"""

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import Callable, Coroutine

from devcluster import containers, faults, forward, kubeflow, trainjob
from devcluster.api import Client
from devcluster.certificates import Subject
from devcluster.controlplane import ControlPlane
from devcluster.errors import DevclusterError
from devcluster.images import Images
from devcluster.kubeletserver import KubeletServer
from devcluster.network import Sandboxes
from devcluster.node import Node, Shared
from devcluster.services import Services
from devcluster.storage import Storage


def parse_forward(text: str) -> tuple[int, str, int]:
    """`PORT=svc.ns:port` as (host port, ns/svc, service port); raises DevclusterError for another form."""
    left, _, right = text.partition("=")
    name, _, port = right.rpartition(":")
    service, _, namespace = name.partition(".")
    if not (left.isdigit() and port.isdigit() and service and namespace):
        raise DevclusterError(
            f"--forward {text!r}: expected PORT=service.namespace:port, such as 9090=metrics.default:80"
        )
    return int(left), f"{namespace.removesuffix('.svc')}/{service}", int(port)


def check_containers() -> bool:
    """Try bwrap: whether /proc must be bound (because it is masked). Raises DevclusterError where it cannot run."""
    base = [containers.bwrap_path(), "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/"]
    first = subprocess.run([*base, "--proc", "/proc", "true"], capture_output=True, text=True, check=False)
    if first.returncode == 0:
        return False
    second = subprocess.run([*base, "--ro-bind", "/proc", "/proc", "true"], capture_output=True, text=True, check=False)
    if second.returncode == 0:
        return True
    raise DevclusterError(f"containers cannot run here: {second.stderr.strip()} (are user namespaces switched off?)")


class Workload:
    """The running parts of a full cluster."""

    def __init__(self, plane: ControlPlane, admin: Client, masked_proc: bool) -> None:
        self._plane, self._admin, self._masked = plane, admin, masked_proc
        self._stack = contextlib.AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def _spawn(self, name: str, run: Callable[[], Coroutine[None, None, None]]) -> None:
        task = asyncio.create_task(run(), name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and task.exception() and not self.failed.done():
            self.failed.set_exception(task.exception() or RuntimeError(task.get_name()))

    async def start(self) -> None:
        """Start everything; returns when the nodes are Ready."""
        plane, spec = self._plane, self._plane.spec
        proxy = plane.client(plane.identity("proxy", "system:kube-proxy"))
        self._stack.push_async_callback(proxy.close)
        services = Services(proxy)
        storage = Storage(self._admin, spec.volumes)
        await storage.start()
        self._spawn("services", services.run)
        self._spawn("storage", storage.run)
        images = Images(spec.root / "images.yaml")
        images.add(dict(spec.images))
        shared = Shared(spec, images, services, Sandboxes(), self._masked)
        nodes, servers = [], []
        for index in range(spec.nodes):
            node, server = await self._node(shared, index)
            nodes.append(node)
            servers.append(server)
        await kubeflow.start(plane, self._admin)
        if "trainjob" in spec.extras:
            await trainjob.start(plane, self._admin)
        await self._until_nodes_ready(nodes)
        self.faults = faults.actions(faults.Parts(nodes, servers, images, storage))
        self.services = services

    async def _node(self, shared: Shared, index: int) -> tuple[Node, KubeletServer]:
        plane = self._plane
        name = f"node-{index}"
        identity = plane.identity(f"kubelet-{name}", f"system:node:{name}", ("system:nodes",))
        node = Node(shared, plane.client(identity), index)
        await node.start()
        self._stack.push_async_callback(node.stop)
        serving = plane.ca.issue(f"kubelet-server-{name}", Subject(f"system:node:{name}", (), (node.ip, name)))
        server = KubeletServer(node, serving, plane.ca.cert_path)
        await server.start()
        self._stack.push_async_callback(server.stop)
        return node, server

    async def _until_nodes_ready(self, nodes: list[Node]) -> None:
        for _ in range(600):
            listed = (await self._admin.get("/api/v1/nodes"))["items"]
            if len(listed) == len(nodes) and not any(each["spec"].get("taints") for each in listed):
                return
            await asyncio.sleep(0.05)
        raise DevclusterError("the nodes did not become schedulable in 30 s; see the controller manager's log")

    async def forward(self, text: str, listener: socket.socket) -> None:
        """Serve a --forward: a listening socket from outside to a service's endpoint."""
        _, service, port = parse_forward(text)
        await forward.serve(listener, lambda: self.services.resolve(service, port))

    async def stop(self) -> None:
        """Stop nodes and helpers, the last started first."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()
