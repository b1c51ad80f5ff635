"""Services without kube-proxy and without DNS: ClusterIPs on `lo`, names in hosts files.

Called by the supervisor, inside the namespace, under the identity `system:kube-proxy`. Each ClusterIP is an address on
the loopback device; each of its TCP ports forwards to a ready endpoint, chosen anew for each connection. UDP services
and session affinity are not served. The node asks it for the names that a pod may use.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from devcluster import forward, hosts, netlink
from devcluster.api import Client, Informer, Obj

log = logging.getLogger(__name__)
Port = tuple[str, int]
SETTLE = 0.05  # seconds: changes come in bursts, one pass serves them all


class Services:
    """The services of one cluster, kept in step with the API."""

    def __init__(self, client: Client) -> None:
        self._services = Informer(client, "/api/v1/services", {}, self._changed)
        self._slices = Informer(client, "/apis/discovery.k8s.io/v1/endpointslices", {}, self._slice_changed)
        self._by_service: dict[str, dict[str, Obj]] = {}
        self._listeners: dict[Port, asyncio.Server] = {}
        self._dirty = asyncio.Event()
        self._bodies: dict[str, str] = {}
        self.listening: list[Callable[[], None]] = []

    def _changed(self, _kind: str, _obj: Obj) -> None:
        self._dirty.set()

    def _slice_changed(self, kind: str, slice_: Obj) -> None:
        service = hosts.service_of(slice_)
        known = self._by_service.setdefault(service, {})
        if kind == "DELETED":
            known.pop(slice_["metadata"]["name"], None)
        else:
            known[slice_["metadata"]["name"]] = slice_
        self._dirty.set()

    def body(self, namespace: str) -> str:
        """The shared part of the hosts file for pods of this namespace."""
        if namespace not in self._bodies:
            slices = {key: list(each.values()) for key, each in self._by_service.items()}
            self._bodies[namespace] = hosts.body(self._services.store.values(), slices, namespace)
        return self._bodies[namespace]

    async def run(self) -> None:
        """Follow services and endpoints for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._services.run())
            group.create_task(self._slices.run())
            await self._services.synced.wait()
            await self._slices.synced.wait()
            while True:
                await self._dirty.wait()
                self._dirty.clear()
                await self._sync()
                await asyncio.sleep(SETTLE)

    async def _sync(self) -> None:
        self._bodies.clear()
        wanted = {}
        for service in self._services.store.values():
            for port in _tcp_ports(service):
                wanted[(service["spec"]["clusterIP"], port["port"])] = (service, port)
        for gone in self._listeners.keys() - wanted.keys():
            self._listeners.pop(gone).close()
        for where in wanted.keys() - self._listeners.keys():
            service, port = wanted[where]
            await self._open(where, f"{service['metadata']['namespace']}/{service['metadata']['name']}", port)
        for tell in self.listening:
            tell()

    async def _open(self, where: Port, service: str, port: dict[str, Any]) -> None:
        try:
            await asyncio.to_thread(netlink.add_address, "lo", where[0])
            listener = forward.listen(*where)
        except OSError as error:
            log.error("service %s: %s:%s cannot be opened: %s", service, *where, error)
            return
        name = port.get("name") or ""
        self._listeners[where] = await forward.serve(listener, lambda: self.endpoint(service, name))

    def endpoint(self, service: str, port_name: str) -> Port | None:
        """Address and port of one ready endpoint of namespace/name, or None."""
        choices: list[Port] = []
        for slice_ in self._by_service.get(service, {}).values():
            for port in slice_.get("ports") or []:
                if (port.get("name") or "") == port_name:
                    choices += [(each["addresses"][0], port["port"]) for each in hosts.ready_endpoints([slice_])]
        return random.choice(choices) if choices else None

    def resolve(self, service: str, number: int) -> Port | None:
        """An endpoint behind a service's port number, for a forward from outside."""
        found = self._services.store.get(service)
        for port in (found["spec"].get("ports") or []) if found else []:
            if port["port"] == number:
                return self.endpoint(service, port.get("name") or "")
        return None


def _tcp_ports(service: Obj) -> list[dict[str, Any]]:
    if service["spec"].get("clusterIP", "None") in ("", "None"):
        return []
    return [port for port in service["spec"].get("ports") or [] if port.get("protocol", "TCP") == "TCP"]
