"""The life of one container of a pod: image, configuration, start, probes, end, restart with back-off.

Called by the pod worker, one loop per container. It writes the container's state and reports; it decides nothing about
the pod.
"""

import asyncio
import logging
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from devcluster import containers, probes
from devcluster.api import ApiError, Obj
from devcluster.containers import Container, Launch, Mount
from devcluster.env import ConfigError
from devcluster.errors import DevclusterError
from devcluster.fields import expand
from devcluster.images import Image
from devcluster.nodeapi import now
from devcluster.podstatus import ContainerState, Terminated, stamp

if TYPE_CHECKING:
    from devcluster.pods import PodWorker

log = logging.getLogger(__name__)
BACKOFF_FIRST, BACKOFF_MOST = 10.0, 300.0
MESSAGE_LIMIT = 4096
FALLBACK_BYTES, FALLBACK_LINES = 2048, 80


class Waiting(Exception):
    """The container cannot start now: reason and message of its waiting state."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


@dataclass(frozen=True)
class Owner:
    """The user and group that a container runs as."""

    uid: int
    gid: int


def owner(pod: Obj, container: Obj, image: Image) -> Owner:
    """Who the container runs as; raises Waiting where runAsNonRoot cannot be honoured. Pure."""
    outer, inner = pod["spec"].get("securityContext") or {}, container.get("securityContext") or {}
    merged = {**outer, **inner}
    uid = int(merged.get("runAsUser", image.uid))
    gid = int(merged.get("runAsGroup", image.uid if uid == image.uid else 0))
    if merged.get("runAsNonRoot") and uid == 0:
        how = (
            "container's runAsUser breaks non-root policy"
            if "runAsUser" in merged
            else ("container has runAsNonRoot and image will run as root")
        )
        name = f"{pod['metadata']['name']}_{pod['metadata']['namespace']}({pod['metadata']['uid']})"
        raise Waiting("CreateContainerConfigError", f'{how} (pod: "{name}", container: {container["name"]})')
    return Owner(uid, gid)


def argv(container: Obj, image: Image, values: dict[str, str]) -> tuple[str, ...]:
    """Command line by the rules of command and args; raises Waiting where there is none. Pure."""
    command = container.get("command") or list(image.entrypoint)
    words = tuple(expand(str(word), values) for word in [*command, *(container.get("args") or [])])
    if not words:
        raise Waiting("CreateContainerError", f"no command specified and image {image.name!r} has no entrypoint")
    return words


def end_message(message: str, log_text: str, policy: str, code: int) -> str:
    """The termination message: the file's, or with FallbackToLogsOnError the end of the log. Pure."""
    if message or policy != "FallbackToLogsOnError" or code == 0:
        return message[:MESSAGE_LIMIT]
    lines = log_text[-FALLBACK_BYTES:].splitlines(keepends=True)[-FALLBACK_LINES:]
    return "".join(lines)


class ContainerLoop:
    """One container of one pod."""

    def __init__(self, worker: "PodWorker", spec: Obj, state: ContainerState, init: bool) -> None:
        self._worker, self.spec, self.state, self._init = worker, spec, state, init
        self.container: Container | None = None
        self.folder: Path = worker.files.folder / str(spec["name"])
        self.oom = False
        self._failures = 0

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.state.restarts}.log"

    def log_of(self, previous: bool) -> Path:
        """The current or the previous log file."""
        return self.folder / f"{self.state.restarts - 1}.log" if previous else self.log_path

    async def run(self) -> None:
        """Run the container until it has ended for good; raises Stopping when the pod is stopped before it starts."""
        while True:
            launch = await self._until_startable()
            await self._once(launch)
            if not self._again():
                return
            await self._back_off()

    def _again(self) -> bool:
        policy = self._worker.state.restart_policy
        if self._init and policy == "Always":
            policy = "OnFailure"
        ended = self.state.terminated
        failed = ended is not None and ended.exit_code != 0
        return not self._worker.stopping.is_set() and (policy == "Always" or (policy == "OnFailure" and failed))

    async def _back_off(self) -> None:
        # A kubelet restarts the first time at once and then waits 10 s, 20 s, 40 s.
        delay = 0.0 if not self._failures else min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** (self._failures - 1))
        self._failures += 1
        if delay:
            self.state.last, self.state.terminated = self.state.terminated, None
            message = f"back-off {delay:.0f}s restarting failed container={self.spec['name']}"
            self.state.waiting = ("CrashLoopBackOff", message)
            await self._worker.report()
            await self._worker.event("Warning", "BackOff", message)
            await self._worker.pause(delay)
        else:
            self.state.last, self.state.terminated = self.state.terminated, None
            self.state.waiting = ("ContainerCreating", "")
        self.state.restarts += 1

    async def _until_startable(self) -> Launch:
        pulls = 0
        while True:
            try:
                image = await self._image(pulls)
                return await self._launch(image)
            except Waiting as waiting:
                if self.state.waiting != (waiting.reason, waiting.message):
                    self.state.waiting = (waiting.reason, waiting.message)
                    await self._worker.report()
                    await self._worker.event("Warning", "Failed", f"Error: {waiting.message or waiting.reason}")
                pulls += 1
            await self._worker.pause(min(1.0 * pulls, 10.0))

    async def _image(self, tries: int) -> Image:
        name = str(self.spec["image"])
        try:
            image = await asyncio.to_thread(self._worker.node.images.find, name)
        except DevclusterError as error:
            raise Waiting("CreateContainerError", str(error)) from error
        if image is not None:
            return image
        if tries % 2:
            raise Waiting("ImagePullBackOff", f'Back-off pulling image "{name}"')
        raise Waiting("ErrImagePull", f'image "{name}" is not in images.yaml (or refused); devcluster pulls nothing')

    async def _launch(self, image: Image) -> Launch:
        files, pod = self._worker.files, self._worker.pod
        who = owner(pod, self.spec, image)
        try:
            values = await files.environment(self.spec, image, self._worker.node.service_env)
            mounts = files.mounts(self.spec, values)
        except (ConfigError, ValueError) as error:
            raise Waiting("CreateContainerConfigError", str(error)) from error
        except (ApiError, OSError) as error:
            raise Waiting("CreateContainerError", str(error)) from error
        values.setdefault("HOME", "/root" if who.uid == 0 else containers.HOME)
        return self._record(image, values, who, mounts)

    def _record(self, image: Image, values: dict[str, str], who: Owner, mounts: tuple[Mount, ...]) -> Launch:
        security = self.spec.get("securityContext") or {}
        message = self.folder / "termination-log"
        message.parent.mkdir(parents=True, exist_ok=True)
        message.write_text("")
        target = self.spec.get("terminationMessagePath") or "/dev/termination-log"
        etc = self._worker.etc_for(who.uid, who.gid)
        return Launch(
            argv=argv(self.spec, image, values),
            image=image,
            env=values,
            uid=who.uid,
            gid=who.gid,
            hostname=self._worker.hostname,
            etc=str(etc),
            mounts=(*mounts, Mount(str(message), target)),
            workdir=self.spec.get("workingDir") or image.workdir,
            read_only_root=bool(security.get("readOnlyRootFilesystem")),
            masked_proc=self._worker.node.masked_proc,
        )

    async def _once(self, launch: Launch) -> None:
        self.oom = False
        with open(self.log_path, "ab") as out:  # noqa: ASYNC230 - a local file, opened once
            self.container = await containers.start(launch, self._worker.namespace, out)
        state = self.state
        state.waiting, state.terminated, state.started_at = None, None, stamp(now())
        state.container_id = f"devcluster://{self._worker.uid}-{self.spec['name']}-{state.restarts}"
        if self._worker.stopping.is_set():
            self.container.signal(signal.SIGKILL)
        watching = asyncio.create_task(self._probe(self.container))
        try:
            code = await self.container.wait()
        finally:
            watching.cancel()
        state.terminated = self._ended(code)
        state.ready = state.started = False
        self.container = None
        await self._worker.report()

    def _ended(self, code: int) -> Terminated:
        if code == 1 and self._never_started():
            text = "failed to start container: " + self.log_path.read_text(errors="replace").strip()
            return Terminated(128, "StartError", text, "", stamp(now()), self.state.container_id)
        message = (self.folder / "termination-log").read_text(errors="replace")
        text = self.log_path.read_text(errors="replace") if code else ""
        shown = end_message(message, text, self.spec.get("terminationMessagePolicy") or "File", code)
        reason = "OOMKilled" if self.oom else ("Completed" if code == 0 else "Error")
        return Terminated(code, reason, shown, self.state.started_at, stamp(now()), self.state.container_id)

    def _never_started(self) -> bool:
        """Whether all that the log holds is bwrap's word that it could not execute the command."""
        return self.log_path.read_text(errors="replace").startswith("bwrap: ")

    async def _probe(self, container: Container) -> None:
        target = probes.Target(
            self.spec, container, self.state, self._worker.state.pod_ip, self._worker.report, self._probe_failed
        )
        if not await probes.watch(target):
            await self._worker.event("Normal", "Killing", f"Container {self.spec['name']} failed its probe, restarting")
            await container.stop(self._worker.grace)

    async def _probe_failed(self, kind: str, message: str) -> None:
        await self._worker.event("Warning", "Unhealthy", f"{kind} probe failed: {message}")

    async def stop(self, grace: float) -> None:
        """Stop the container if it runs."""
        if self.container is not None:
            await self.container.stop(grace)

    def kill(self, number: int = signal.SIGKILL, oom: bool = False) -> bool:
        """A fault: send a signal from outside; returns whether there was a running container."""
        if self.container is None:
            return False
        self.oom = oom
        self.container.signal(number)
        return True
