"""Faults on demand, and the rest of what can be asked of a running cluster.

Asked for through `control`, by the command line and by `devcluster.testing`. Each fault is what a cluster really does
to a job: a killed container, an out-of-memory kill, a lost node, an image that cannot be pulled, a full or read-only
volume.
"""

import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from devcluster import volumes
from devcluster.containerloop import ContainerLoop
from devcluster.control import Bound, Refused
from devcluster.images import Images
from devcluster.kubeletserver import KubeletServer
from devcluster.node import Node
from devcluster.storage import Storage

FILL_NAME = ".devcluster-fill"


@dataclass(frozen=True)
class Parts:
    """What faults act on."""

    nodes: list[Node]
    servers: list[KubeletServer]
    images: Images
    storage: Storage


def _container(parts: Parts, ask: dict[str, Any]) -> ContainerLoop:
    for node in parts.nodes:
        worker = node.find(ask.get("namespace", "default"), ask["pod"])
        if worker is not None:
            name = ask.get("container") or worker.mains[0].spec["name"]
            loop = worker.loop(name)
            if loop is None:
                raise Refused(f"pod {ask['pod']} has no container {name!r}")
            return loop
    raise Refused(f"no node runs a pod {ask.get('namespace', 'default')}/{ask['pod']}")


async def kill(parts: Parts, ask: dict[str, Any]) -> str:
    """Send a signal (default KILL) to a container's first process."""
    number = signal.Signals[f"SIG{str(ask.get('signal', 'KILL')).removeprefix('SIG')}"]
    if not _container(parts, ask).kill(number):
        raise Refused(f"the container of pod {ask['pod']} is not running")
    return f"{number.name} sent"


async def oom(parts: Parts, ask: dict[str, Any]) -> str:
    """Kill a container as the kernel's out-of-memory killer would: exit 137, reason OOMKilled."""
    if not _container(parts, ask).kill(signal.SIGKILL, oom=True):
        raise Refused(f"the container of pod {ask['pod']} is not running")
    return "killed as if out of memory"


def _node(parts: Parts, ask: dict[str, Any]) -> int:
    for position, node in enumerate(parts.nodes):
        if node.name == ask["node"]:
            return position
    raise Refused(f"no node {ask['node']!r}; there are {', '.join(node.name for node in parts.nodes)}")


async def lose_node(parts: Parts, ask: dict[str, Any]) -> str:
    """Power a node off: its containers die, nothing is reported; NotReady follows after some 20 s."""
    position = _node(parts, ask)
    if parts.nodes[position].lost:
        raise Refused(f"{ask['node']} is lost already")
    await parts.servers[position].stop()
    await parts.nodes[position].lose()
    return f"{ask['node']} is gone"


async def restore_node(parts: Parts, ask: dict[str, Any]) -> str:
    """Power a lost node on again."""
    position = _node(parts, ask)
    if not parts.nodes[position].lost:
        raise Refused(f"{ask['node']} is not lost")
    parts.nodes[position].begin()
    await parts.servers[position].start()
    return f"{ask['node']} is back"


async def refuse_image(parts: Parts, ask: dict[str, Any]) -> str:
    """No container of this image starts any more (ErrImagePull) until it is allowed again."""
    parts.images.refused.add(ask["image"])
    return f"{ask['image']} is refused"


async def allow_image(parts: Parts, ask: dict[str, Any]) -> str:
    """End of refuse-image."""
    parts.images.refused.discard(ask["image"])
    return f"{ask['image']} is allowed"


def _limited(parts: Parts, ask: dict[str, Any]) -> Path:
    namespace = ask.get("namespace", "default")
    folder = parts.storage.folder(namespace, ask["claim"])
    if folder is None:
        raise Refused(f"claim {namespace}/{ask['claim']} is not bound")
    if not folder.is_mount():
        raise Refused(
            f"claim {namespace}/{ask['claim']} has no size limit; next: annotate it with devcluster/size-limit"
        )
    return folder


async def fill_volume(parts: Parts, ask: dict[str, Any]) -> str:
    """Fill a size-limited claim to the last byte."""
    folder = _limited(parts, ask)
    written = 0
    with open(folder / FILL_NAME, "wb", 0) as handle:  # noqa: ASYNC230 - memory, not a disk
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    written += handle.write(b"\0" * size)
            except OSError:  # full for this block size: on with smaller ones
                continue
    return f"{written} bytes written, {os.statvfs(folder).f_bavail} blocks free"


async def empty_volume(parts: Parts, ask: dict[str, Any]) -> str:
    """End of fill-volume."""
    (_limited(parts, ask) / FILL_NAME).unlink(missing_ok=True)
    return "emptied"


async def read_only_volume(parts: Parts, ask: dict[str, Any]) -> str:
    """Make a size-limited claim read-only for everybody. Fails while a file in it is open for writing."""
    volumes.remount_tmpfs(_limited(parts, ask), True)
    return "read-only"


async def writable_volume(parts: Parts, ask: dict[str, Any]) -> str:
    """End of read-only-volume."""
    volumes.remount_tmpfs(_limited(parts, ask), False)
    return "writable"


async def add_image(parts: Parts, ask: dict[str, Any]) -> str:
    """Add names to images.yaml while the cluster runs."""
    parts.images.add(ask["entries"])
    return f"{', '.join(ask['entries'])} added"


async def claims(parts: Parts, _ask: dict[str, Any]) -> dict[str, str]:
    """The folders behind the bound claims."""
    return parts.storage.table()


Action = Callable[[Parts, dict[str, Any]], Awaitable[Any]]
ACTIONS: dict[str, Action] = {
    "kill": kill,
    "oom": oom,
    "lose-node": lose_node,
    "restore-node": restore_node,
    "refuse-image": refuse_image,
    "allow-image": allow_image,
    "fill-volume": fill_volume,
    "empty-volume": empty_volume,
    "read-only-volume": read_only_volume,
    "writable-volume": writable_volume,
    "add-image": add_image,
    "claims": claims,
}


def actions(parts: Parts) -> dict[str, Bound]:
    """By the names that are asked for."""
    return {name: partial(action, parts) for name, action in ACTIONS.items()}
