"""The cluster's private network, and what stands in for it where namespaces are not to be had.

The supervisor enters its own network (and mount) namespace before it starts a thread or a process, so two clusters
can use the same ports and addresses without seeing each other: on a shared network two training jobs on the default
port silently mixed. A pod's sandbox is a further network namespace, held open by a descriptor. As an ordinary user a
user namespace comes first, in which we are root. Where the kernel refuses, `enter` says why and the control plane runs
on the host's loopback instead.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import threading
from dataclasses import dataclass

from devcluster import netlink
from devcluster.processes import LIBC
from devcluster.state import BRIDGE_IP, POD_PREFIX

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
BRIDGE = "br0"


@dataclass(frozen=True)
class Network:
    """Where the control plane listens. `private` is False on the host's network, and `why` then says what failed."""

    private: bool
    why: str = ""
    host: str = BRIDGE_IP
    advertise: str = BRIDGE_IP
    api_port: int = 6443
    etcd_port: int = 2379
    etcd_peer_port: int = 2380

    @property
    def server(self) -> str:
        """The API server's address as our own processes use it."""
        return f"https://{self.host}:{self.api_port}"


def _enter_user_namespace() -> None:
    uid, gid = os.getuid(), os.getgid()
    netlink.unshare(CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)


def _enter_namespaces() -> None:
    flags = netlink.CLONE_NEWNET | CLONE_NEWNS
    if os.geteuid() == 0:
        # Root in a container may lack the right and still be given a user namespace, as anybody.
        with contextlib.suppress(PermissionError):
            netlink.unshare(flags)
            return
    _enter_user_namespace()
    netlink.unshare(flags)


def free_ports(count: int) -> list[int]:
    """Ports that were free on 127.0.0.1 a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _host_address() -> str:
    """An address of this host that is not loopback; none is ever contacted by this look-up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:  # no default route: the API server only wants a well-formed address that is not loopback
            return "192.0.2.1"


def host_network(why: str) -> Network:
    """The fallback: everything on 127.0.0.1 with free ports."""
    api, etcd, peer = free_ports(3)
    return Network(False, why, "127.0.0.1", _host_address(), api, etcd, peer)


def enter() -> Network:
    """Enter the private network, or fall back. Call it once, single-threaded, before any child is started."""
    try:
        _enter_namespaces()
        if LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
            raise OSError("making the mount namespace private failed")
        netlink.make_bridge(BRIDGE, BRIDGE_IP, POD_PREFIX)
    except OSError as error:
        return host_network(f"{error} (are user or network namespaces switched off on this machine?)")
    return Network(True)


class Sandboxes:
    """Makes and gives back pods' network namespaces; addresses are 10.244.<node + 1>.<2..254>."""

    def __init__(self) -> None:
        self._counter = itertools.count()
        self._used: set[str] = set()

    def _address(self, node: int) -> str:
        """The lowest that is free: a lone pod that a restored node starts again gets the one that it had."""
        for last in range(2, 255):
            address = f"10.244.{node + 1}.{last}"
            if address not in self._used:
                self._used.add(address)
                return address
        raise OSError(f"node {node} has no free pod address (253 in use)")

    async def make(self, node: int) -> "Sandbox":
        """A namespace with an address on the bridge."""
        address = self._address(node)
        veth = f"v{next(self._counter)}"
        return Sandbox(await asyncio.to_thread(_make, veth, address), address, veth, self)

    def release(self, address: str) -> None:
        """The address may be used again."""
        self._used.discard(address)


def _make(veth: str, address: str) -> int:
    namespace = netlink.new_namespace()
    netlink.attach(namespace, netlink.Wire(veth, BRIDGE, address, POD_PREFIX, BRIDGE_IP))
    return namespace


@dataclass
class Sandbox:
    """One pod's network: a namespace descriptor, its address, and the bridge's end of its link."""

    namespace: int
    address: str
    veth: str
    owner: Sandboxes

    def close(self) -> None:
        """Give the namespace up. Its link is taken away and does not wait for the kernel to clean up: as long as it is
        there, it answers for an address that the next pod may have, and resets that one's connections."""
        if self.namespace >= 0:
            os.close(self.namespace)
            self.namespace = -1
            threading.Thread(target=self._disconnect, name=f"end of {self.veth}").start()

    def _disconnect(self) -> None:
        try:
            netlink.remove_link(self.veth)
        finally:
            self.owner.release(self.address)
