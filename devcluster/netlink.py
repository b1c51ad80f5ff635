"""Links, addresses and routes, made through netlink: no `ip` tool needed.

Called by the network module from worker threads (pyroute2 runs an event loop of its own, and a network namespace is a
property of the thread). Nothing here knows about pods or clusters.
"""

import contextlib
import ctypes
import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from pyroute2 import IPRoute, NetlinkError

from devcluster.processes import LIBC

CLONE_NEWNET = 0x40000000


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """unshare(2) of the calling thread."""
    _check(LIBC.unshare(flags), f"unshare({flags:#x})")


@contextlib.contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Run the calling thread in the network namespace of this descriptor, then return to where it was."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(LIBC.setns(namespace, CLONE_NEWNET), "setns")
        yield
    finally:
        _check(LIBC.setns(before, CLONE_NEWNET), "setns back")
        os.close(before)


def new_namespace() -> int:
    """A fresh network namespace as a descriptor; it lives as long as the descriptor or a process in it."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        _check(LIBC.setns(before, CLONE_NEWNET), "setns back")
        os.close(before)


def _index(ip: IPRoute, name: str) -> int:
    found = ip.link_lookup(ifname=name)
    if not found:
        raise OSError(f"link {name} not found")
    return int(found[0])


BRIDGE_MAC = "02:00:0a:f4:00:01"
"""Given, because a bridge without one takes the lowest of its ports': it would change as pods come and go, and
whoever remembers the old one sends into the void for half a minute."""


def make_bridge(name: str, address: str, prefix: int) -> None:
    """A bridge with an address and the default route (the API server refuses to start without one); `lo` goes up."""
    with IPRoute() as ip:
        ip.link("set", index=_index(ip, "lo"), state="up")
        ip.link("add", ifname=name, kind="bridge", address=BRIDGE_MAC)
        bridge = _index(ip, name)
        ip.addr("add", index=bridge, address=address, prefixlen=prefix)
        ip.link("set", index=bridge, state="up")
        ip.route("add", family=socket.AF_INET, dst="0.0.0.0/0", oif=bridge)


def remove_link(name: str) -> None:
    """Take a link away, with its other end; one that has gone by itself is success."""
    with IPRoute() as ip:
        for index in ip.link_lookup(ifname=name):
            try:
                ip.link("del", index=index)
            except NetlinkError as error:
                if error.code != errno.ENODEV:  # the kernel took it meanwhile
                    raise


def add_address(link: str, address: str, prefix: int = 32) -> None:
    """Put a further address on a link; one that is there already is left alone."""
    with IPRoute() as ip:
        ip.addr("replace", index=_index(ip, link), address=address, prefixlen=prefix)


def del_address(link: str, address: str, prefix: int = 32) -> None:
    """Take an address off a link again."""
    with IPRoute() as ip:
        ip.addr("del", index=_index(ip, link), address=address, prefixlen=prefix)


@dataclass(frozen=True)
class Wire:
    """A pod's link: its end on the bridge is `veth`, the other is `eth0` with this address."""

    veth: str
    bridge: str
    address: str
    prefix: int
    gateway: str


def attach(namespace: int, wire: Wire) -> None:
    """Give the namespace an `eth0` on the bridge with an address and a default route over the gateway."""
    with IPRoute() as ip:
        ip.link("add", ifname=wire.veth, kind="veth", peer={"ifname": "eth0", "net_ns_fd": namespace})
        ip.link("set", index=_index(ip, wire.veth), master=_index(ip, wire.bridge), state="up")
    with inside(namespace), IPRoute() as ip:
        ip.link("set", index=_index(ip, "lo"), state="up")
        eth0 = _index(ip, "eth0")
        ip.addr("add", index=eth0, address=wire.address, prefixlen=wire.prefix)
        ip.link("set", index=eth0, state="up")
        ip.route("add", dst="default", gateway=wire.gateway)
