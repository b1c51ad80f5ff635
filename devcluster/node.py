"""One node: registration, heartbeat, and a worker for each pod that the scheduler puts on it.

It stands where a kubelet stands, under the identity `system:node:<name>`. Its capacity is whatever was asked for:
`nvidia.com/gpu: 8` is scheduled and counted without a GPU.
"""

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass

from devcluster import binaries, netlink
from devcluster.api import ApiError, Client, Informer, Obj
from devcluster.images import Images
from devcluster.network import BRIDGE, Sandboxes
from devcluster.nodeapi import NodeApi, now
from devcluster.pods import PodWorker
from devcluster.podstatus import stamp
from devcluster.services import Services
from devcluster.state import API_SERVICE_IP, POD_PREFIX, ClusterSpec

log = logging.getLogger(__name__)
KUBELET_PORT = 10250
LEASE_SECONDS, LEASE_PERIOD = 40, 10.0
MAX_PODS = 200


@dataclass(frozen=True)
class Shared:
    """What all nodes of a cluster have in common."""

    spec: ClusterSpec
    images: Images
    services: Services
    sandboxes: Sandboxes
    masked_proc: bool = False


def _capacity(gpus: int) -> Obj:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # CPU and memory are generous on purpose: jobs ask for what they need in production, here only GPUs are counted.
    found = {"cpu": "64", "memory": f"{max(memory >> 10, 512 << 20)}Ki", "pods": str(MAX_PODS)}
    found |= {"ephemeral-storage": "1Ti"}
    return found | ({"nvidia.com/gpu": str(gpus)} if gpus else {})


def node_object(name: str, address: str, gpus: int, when: str) -> Obj:
    """The Node as it registers: capacity, addresses, four conditions. Pure but for the memory size."""
    quiet = {
        "MemoryPressure": "KubeletHasSufficientMemory",
        "DiskPressure": "KubeletHasNoDiskPressure",
        "PIDPressure": "KubeletHasSufficientPID",
    }
    conditions = [{"type": kind, "status": "False", "reason": why} for kind, why in quiet.items()]
    conditions.append({"type": "Ready", "status": "True", "reason": "KubeletReady"})
    for each in conditions:
        each |= {"lastHeartbeatTime": when, "lastTransitionTime": when, "message": "reported by devcluster"}
    labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    machine = os.uname()
    labels["kubernetes.io/arch"] = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine.machine, machine.machine)
    info = dict.fromkeys(("machineID", "systemUUID", "bootID", "kubeProxyVersion"), "")
    info |= {"kernelVersion": machine.release, "osImage": "devcluster", "containerRuntimeVersion": "bwrap://0"}
    info |= {
        "kubeletVersion": binaries.VERSION,
        "operatingSystem": "linux",
        "architecture": labels["kubernetes.io/arch"],
    }
    capacity = _capacity(gpus)
    status = {
        "capacity": capacity,
        "allocatable": capacity,
        "conditions": conditions,
        "addresses": [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": KUBELET_PORT}},
        "nodeInfo": info,
        "declaredFeatures": ["ExtendWebSocketsToKubelet"],
    }
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}, "status": status}


class Node:
    """A node and its pods."""

    def __init__(self, shared: Shared, client: Client, index: int) -> None:
        self.spec, self.images, self.services = shared.spec, shared.images, shared.services
        self.sandboxes, self.masked_proc = shared.sandboxes, shared.masked_proc
        self.index, self.name, self.ip = index, f"node-{index}", f"10.244.0.{10 + index}"
        self.api = NodeApi(client, self.name)
        self.workers: dict[str, PodWorker] = {}
        self.lost = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._uids: dict[str, str] = {}
        self._background: list[asyncio.Task[None]] = []
        self.service_env = {
            "KUBERNETES_SERVICE_HOST": API_SERVICE_IP,
            "KUBERNETES_SERVICE_PORT": "443",
            "KUBERNETES_SERVICE_PORT_HTTPS": "443",
            "KUBERNETES_PORT": f"tcp://{API_SERVICE_IP}:443",
        }

    async def start(self) -> None:
        """Register, and begin to follow pods."""
        await asyncio.to_thread(netlink.add_address, BRIDGE, self.ip, POD_PREFIX)
        await self._register()
        self.begin()

    def begin(self) -> None:
        """Heartbeat and pods, from now on."""
        self.lost = False
        pods = Informer(self.api.client, "/api/v1/pods", {"fieldSelector": f"spec.nodeName={self.name}"}, self._pod)
        self._background = [asyncio.create_task(self._beat()), asyncio.create_task(pods.run())]
        self.services.listening.append(self._names_changed)

    async def _keep_ready(self) -> None:
        """Say Ready again where the node controller has put Unknown: after a pause, or a lost node's return."""
        node = await self.api.client.get(f"/api/v1/nodes/{self.name}")
        ready = [each["status"] for each in node["status"]["conditions"] if each["type"] == "Ready"]
        if ready != ["True"]:
            fresh = node_object(self.name, self.ip, self.spec.gpus_per_node, stamp(now()))
            await self.api.client.patch(f"/api/v1/nodes/{self.name}/status", {"status": fresh["status"]})

    async def _register(self) -> None:
        node = node_object(self.name, self.ip, self.spec.gpus_per_node, stamp(now()))
        try:
            answer = await self.api.client.post("/api/v1/nodes", node)
        except ApiError as error:
            if error.code != 409:
                raise
            answer = await self.api.client.get(f"/api/v1/nodes/{self.name}")
        owner = {"apiVersion": "v1", "kind": "Node", "name": self.name, "uid": answer["metadata"]["uid"]}
        lease = {"metadata": {"name": self.name, "ownerReferences": [owner]}, "spec": self._lease()}
        with contextlib.suppress(ApiError):  # it exists already: the heartbeat renews it
            await self.api.client.post("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", lease)

    def _lease(self) -> Obj:
        renewed = now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {"holderIdentity": self.name, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": renewed}

    async def _beat(self) -> None:
        path = f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{self.name}"
        while True:
            try:
                await self.api.client.patch(path, {"spec": self._lease()})
                await self._keep_ready()
            except (ApiError, OSError) as error:
                log.warning("%s: the lease was not renewed: %s", self.name, error)
            await asyncio.sleep(LEASE_PERIOD)

    def _names_changed(self) -> None:
        for worker in self.workers.values():
            worker.refresh_hosts()

    def _pod(self, kind: str, pod: Obj) -> None:
        uid = str(pod["metadata"]["uid"])
        key = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
        before = self._uids.get(key)
        if before and before != uid and before in self.workers:
            self.workers[before].removed()
        self._uids[key] = uid
        worker = self.workers.get(uid)
        if kind == "DELETED":
            if worker:
                worker.removed()
        elif worker:
            worker.update(pod)
        elif pod.get("status", {}).get("phase") not in ("Succeeded", "Failed") or pod["metadata"].get(
            "deletionTimestamp"
        ):
            self._begin_pod(pod)

    def _begin_pod(self, pod: Obj) -> None:
        worker = PodWorker(self, pod)
        self.workers[worker.uid] = worker
        worker.update(pod)
        self._tasks[worker.uid] = asyncio.create_task(self._run_pod(worker))

    async def _run_pod(self, worker: PodWorker) -> None:
        name = f"{worker.pod['metadata']['namespace']}/{worker.pod['metadata']['name']}"
        try:
            await worker.run()
        except Exception:
            # The last resort of one pod's worker: other pods go on, the log says what happened to this one.
            log.exception("pod %s: its worker failed", name)
        finally:
            if self.workers.get(worker.uid) is worker:
                del self.workers[worker.uid]
            self._tasks.pop(worker.uid, None)

    def find(self, namespace: str, name: str) -> PodWorker | None:
        """The worker of this pod, if it is on this node."""
        for worker in self.workers.values():
            meta = worker.pod["metadata"]
            if (meta["namespace"], meta["name"]) == (namespace, name) and not worker.gone:
                return worker
        return None

    async def lose(self) -> None:
        """Vanish as a machine that lost its power: no heartbeat, no report, everything on it killed."""
        self.lost = True
        self.services.listening.remove(self._names_changed)
        tasks = [*self._background, *self._tasks.values()]
        for worker in self.workers.values():
            worker.gone = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.workers.clear()

    async def stop(self) -> None:
        """End with the cluster."""
        if not self.lost:
            await self.lose()
        await self.api.client.close()
