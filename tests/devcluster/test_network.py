"""The cluster's bridge, in a network namespace of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pyroute2 import IPRoute
from devcluster import netlink, network

found = network.enter()
if not found.private:
    sys.exit("skip: " + found.why)

def mac(name):
    with IPRoute() as ip:
        return ip.get_links(ifname=name)[0].get_attr("IFLA_ADDRESS")

before = mac(network.BRIDGE)
wire = netlink.Wire("v0", network.BRIDGE, "10.244.1.2", 16, "10.244.0.1")
namespace = netlink.new_namespace()
netlink.attach(namespace, wire)
with IPRoute() as ip:
    ip.link("set", index=ip.link_lookup(ifname="v0")[0], address="02:00:00:00:00:01")
print(before, mac("v0"), mac(network.BRIDGE))
"""


REUSE = """
import asyncio, os, sys, time
from pyroute2 import IPRoute
from devcluster import netlink, network

found = network.enter()
if not found.private:
    sys.exit("skip: " + found.why)

sandboxes = network.Sandboxes()

def make():  # IPRoute wants no loop that runs
    return asyncio.run(sandboxes.make(0))

first = make()
lingering = os.dup(first.namespace)  # as a process that does not die
first.close()
deadline = time.monotonic() + 10
with IPRoute() as ip:
    while ip.link_lookup(ifname=first.veth) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = bool(ip.link_lookup(ifname=first.veth))
with netlink.inside(lingering), IPRoute() as ip:
    inside = len(ip.link_lookup(ifname="eth0"))
print(left, inside, first.address == make().address)
"""


def test_an_address_is_not_answered_for_by_two() -> None:
    """A namespace may outlive its pod; its link may not, and until that has gone its address is nobody else's."""
    done = subprocess.run([sys.executable, "-c", REUSE], capture_output=True, text=True, timeout=60, check=False)
    if done.stderr.startswith("skip: "):
        pytest.skip(f"no network namespace here: {done.stderr.removeprefix('skip: ')}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "0", "True"]


def test_a_pod_with_a_lower_address_leaves_the_bridge_its_own() -> None:
    """Every pod remembers the bridge's hardware address: if it changed, its connections would stall for half a
    minute."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    if done.stderr.startswith("skip: "):
        pytest.skip(f"no network namespace here: {done.stderr.removeprefix('skip: ')}")
    assert done.returncode == 0, done.stderr
    before, pod, after = done.stdout.split()
    assert pod < before
    assert after == before
