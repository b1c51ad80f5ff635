"""The life of one pod on a node: sandbox, volumes, init containers, containers, deletion.

One worker per pod, started by the node. The protocol is the kubelet's: status by patch with the pod's uid; on deletion
TERM, grace, KILL, the final status, then DELETE with grace 0 and the uid as a precondition. An object that vanishes
under a running pod means: kill it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from devcluster import containers, hosts
from devcluster.api import ApiError, Obj
from devcluster.containerloop import ContainerLoop
from devcluster.network import Sandbox
from devcluster.nodeapi import now
from devcluster.podfiles import PodFiles, VolumeError
from devcluster.podstatus import ContainerState, PodState, render, resume, stamp

if TYPE_CHECKING:
    from devcluster.node import Node

log = logging.getLogger(__name__)


class Stopping(Exception):
    """The pod is to be stopped: raised out of waits."""


def _state_of(spec: Obj) -> ContainerState:
    return ContainerState(str(spec["name"]), str(spec["image"]), ("PodInitializing", ""))


class PodWorker:
    """One pod."""

    def __init__(self, node: "Node", pod: Obj) -> None:
        self.node, self.pod = node, pod
        self.uid = str(pod["metadata"]["uid"])
        spec = pod["spec"]
        inits, mains = spec.get("initContainers") or [], spec["containers"]
        states = [_state_of(each) for each in inits], [_state_of(each) for each in mains]
        self.state = PodState(node.ip, *states, spec.get("restartPolicy", "Always"), stamp(now()))
        resume(self.state, pod.get("status") or {}, stamp(now()))
        self.files = PodFiles(node.api, pod, node.spec.pods / self.uid)
        self.inits = [ContainerLoop(self, each, state, True) for each, state in zip(inits, states[0], strict=True)]
        self.mains = [ContainerLoop(self, each, state, False) for each, state in zip(mains, states[1], strict=True)]
        self.grace = float(spec.get("terminationGracePeriodSeconds") or 0)
        self.stopping = asyncio.Event()
        self.changed = asyncio.Event()
        self.gone = False
        self._removed = asyncio.Event()
        self.sandbox: Sandbox | None = None
        self._asked = self._sent = 0
        self._correction: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    @property
    def hostname(self) -> str:
        return str(self.pod["spec"].get("hostname") or self.pod["metadata"]["name"])[:63]

    @property
    def namespace(self) -> int:
        """The sandbox's network namespace, a descriptor."""
        if self.sandbox is None:
            raise RuntimeError(f"pod {self.uid} has no sandbox yet")
        return self.sandbox.namespace

    def loop(self, name: str) -> ContainerLoop | None:
        """The container of this name."""
        return next((each for each in [*self.mains, *self.inits] if each.spec["name"] == name), None)

    def update(self, pod: Obj) -> None:
        """A newer version of the object."""
        self.pod = self.files.pod = pod
        if self._contradicted():
            self._correction = asyncio.create_task(self._retrying(self.report))
        if pod["metadata"].get("deletionTimestamp"):
            self.ask_to_stop(float(pod["metadata"].get("deletionGracePeriodSeconds") or 0))

    def _contradicted(self) -> bool:
        """Whether somebody else has changed what we said, as the node controller does for a node that was late."""
        said = [each["status"] for each in self.pod["status"].get("conditions") or [] if each["type"] == "Ready"]
        known = self.state.transitions.get("Ready")
        return bool(said and known and said != [known[0]] and self._asked == self._sent)

    def removed(self) -> None:
        """The object is gone: whatever still runs is killed, and nothing more is reported."""
        self.gone = True
        self._removed.set()
        self.ask_to_stop(0)

    def ask_to_stop(self, grace: float) -> None:
        """Stop with this grace; a second, shorter one overtakes the first."""
        if not self.stopping.is_set() or grace < self.grace:
            self.grace = grace
            self.stopping.set()
            self.changed.set()

    async def pause(self, seconds: float) -> None:
        """Wait; raises Stopping as soon as the pod is to be stopped."""
        with contextlib.suppress(TimeoutError):  # the usual end of the wait
            await asyncio.wait_for(self.stopping.wait(), seconds)
        if self.stopping.is_set():
            raise Stopping

    async def event(self, kind: str, reason: str, message: str) -> None:
        if not self.gone:
            await self.node.api.event(self.pod, kind, reason, message)

    async def report(self) -> None:
        """Send the present status; reports that pile up meanwhile are sent as one."""
        self._asked += 1
        mine = self._asked
        async with self._lock:
            if self._sent >= mine or self.gone:
                return
            covers = self._asked
            await self.node.api.patch_status(self.pod, render(self.state, stamp(now())))
            self._sent = covers

    def etc_for(self, uid: int, gid: int) -> Path:
        """The folder with this pod's /etc files for that user; its hosts file is shared by all of them."""
        folder = self.files.folder / f"etc-{uid}-{gid}"
        if not folder.exists():
            containers.write_etc(folder, (uid, gid), self.hostname, hosts.NSSWITCH)
        self.refresh_hosts()
        return folder

    def refresh_hosts(self) -> None:
        """Rewrite the hosts files in place."""
        if self.sandbox is None:
            return
        namespace = self.pod["metadata"]["namespace"]
        text = hosts.head(self.pod, self.sandbox.address) + self.node.services.body(namespace)
        for folder in self.files.folder.glob("etc-*"):
            hosts.write_in_place(folder / "hosts", text)

    async def run(self) -> None:
        """The whole life; ends when the object is gone or has been deleted by us."""
        try:
            await self._live_or_stop()
            self.state.stopped = self.state.stopped or self.stopping.is_set()
            await self._retrying(self.report)
            await self.stopping.wait()
            if not self.gone:
                await self._retrying(lambda: self.node.api.delete_pod(self.pod))
            self._clean()
            # A finalizer may keep the object: its log stays readable until it is really gone.
            await self._removed.wait()
        finally:
            self._clean()

    async def _retrying(self, what: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await what()
                return
            except (ApiError, OSError) as error:
                log.warning("pod %s: %s; trying again", self.pod["metadata"]["name"], error)
                await asyncio.sleep(0.5)

    async def _live_or_stop(self) -> None:
        life = asyncio.create_task(self._live())
        stopper = asyncio.create_task(self._stopper())
        try:
            await life
        except Stopping:
            log.debug("pod %s stopped before its end", self.pod["metadata"]["name"])
        finally:
            stopper.cancel()

    async def _stopper(self) -> None:
        """Stops what runs when asked; asked again with less grace, it does so again."""
        tasks: set[asyncio.Task[None]] = set()
        while True:
            await self.changed.wait()
            self.changed.clear()
            for each in [*self.inits, *self.mains]:
                tasks.add(asyncio.create_task(each.stop(self.grace)))

    async def _live(self) -> None:
        if self.stopping.is_set():
            raise Stopping
        if self.state.is_finished():
            return
        self.sandbox = await self.node.sandboxes.make(self.node.index)
        self.files.addresses = {"status.podIP": self.sandbox.address, "status.hostIP": self.node.ip}
        await self._volumes()
        self.state.pod_ip = self.sandbox.address
        refresher = asyncio.create_task(self.files.keep_fresh())
        try:
            for each in self.inits:
                if each.state.terminated is None:
                    await each.run()
                if self.stopping.is_set():
                    raise Stopping
                if self.state.is_finished():
                    return
            await self._run_mains()
        finally:
            refresher.cancel()

    async def _run_mains(self) -> None:
        async with asyncio.TaskGroup() as group:
            for each in self.mains:
                each.state.waiting = ("ContainerCreating", "")
                group.create_task(self._main(each))

    async def _main(self, loop: ContainerLoop) -> None:
        # A task group would turn one container's Stopping into the cancellation of the others, and skip their grace.
        with contextlib.suppress(Stopping):
            await loop.run()

    async def _volumes(self) -> None:
        delay = 0.5
        while True:
            try:
                await self.files.prepare()
                return
            except (VolumeError, ApiError) as error:
                await self.report()
                await self.event("Warning", "FailedMount", str(error))
                await self.pause(delay)
                delay = min(delay * 2, 5.0)

    def _clean(self) -> None:
        for each in [*self.inits, *self.mains]:
            each.kill()
        self.files.remove()
        if self.sandbox is not None:
            self.sandbox.close()
            self.sandbox = None
