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
import asyncio, os, sys, threading
from pyroute2 import IPRoute
from devcluster import netlink, network

found = network.enter()
if not found.private:
    sys.exit("skip: " + found.why)

sandboxes = network.Sandboxes()

def make():  # IPRoute wants no loop that runs
    return asyncio.run(sandboxes.make(0))

first = make()
held, remove = threading.Event(), netlink.remove_link

def when_told(name):
    held.wait(10)
    remove(name)

netlink.remove_link = when_told
lingering = os.dup(first.namespace)  # as a process that does not die
first.close()
meanwhile = make().address
held.set()
for each in threading.enumerate():  # the address is free when this has ended, a moment after the link has gone
    if each.name == f"end of {first.veth}":
        each.join(10)
with IPRoute() as ip:
    left = bool(ip.link_lookup(ifname=first.veth))
with netlink.inside(lingering), IPRoute() as ip:
    inside = len(ip.link_lookup(ifname="eth0"))
print(left, inside, meanwhile == first.address, make().address == first.address)
"""


def told(script: str) -> list[str]:
    """The words that a script prints in a network of its own; skips where there is none."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    if done.stderr.startswith("skip: "):
        pytest.skip(f"no network namespace here: {done.stderr.removeprefix('skip: ')}")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_address_is_not_answered_for_by_two() -> None:
    """A namespace may outlive its pod; its link may not, and until that has gone its address is nobody else's."""
    assert told(REUSE) == ["False", "0", "False", "True"]


def test_a_pod_with_a_lower_address_leaves_the_bridge_its_own() -> None:
    """Every pod remembers the bridge's hardware address: if it changed, its connections would stall for half a
    minute."""
    before, pod, after = told(SCRIPT)
    assert pod < before
    assert after == before
