"""The one process that holds a cluster: started by the launcher, ended by SIGTERM or by the end of its keeper.

Order matters: sockets on 127.0.0.1 first (they belong to the outer network), then the namespaces (the process must
still be single-threaded), then the event loop and the components. It writes ready.json when everything is Ready, or
failed.txt. Children die with it whatever ends it.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from devcluster import control, crds, forward, kubeflow, network, outage, state, trainjob
from devcluster.api import ApiError
from devcluster.certificates import write_kubeconfig
from devcluster.controlplane import ControlPlane
from devcluster.errors import DevclusterError
from devcluster.workload import Workload, check_containers, parse_forward

log = logging.getLogger("devcluster")


def _progress(spec: state.ClusterSpec, text: str) -> None:
    with open(spec.progress_file, "a") as handle:
        handle.write(text + "\n")
    log.info("%s", text)


async def _keeper_gone() -> None:
    """Returns when standard input ends: whoever keeps the cluster (a test run) holds the other end of that pipe."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


async def _until_asked_to_stop(kept: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    waiting: list[asyncio.Task[object]] = [asyncio.create_task(stop.wait())]
    if kept:
        waiting.append(asyncio.create_task(_keeper_gone()))
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)


@dataclass(frozen=True)
class Outside:
    """Sockets of the outer network, made before the namespace: the API's, and one for each --forward."""

    api: socket.socket
    forwards: list[tuple[str, socket.socket]]

    @property
    def server(self) -> str:
        return f"https://127.0.0.1:{self.api.getsockname()[1]}"


def _outside(spec: state.ClusterSpec) -> Outside:
    forwards = [(text, forward.listen("127.0.0.1", parse_forward(text)[0])) for text in spec.forwards]
    return Outside(forward.listen("127.0.0.1", 0), forwards)


def _announce(spec: state.ClusterSpec, server: str, seconds: float) -> None:
    partial = spec.root / "ready.json.partial"
    partial.write_text(json.dumps({"pid": os.getpid(), "api": server, "seconds": round(seconds, 2)}, indent=1))
    partial.rename(spec.ready_file)


async def _run(spec: state.ClusterSpec, net: network.Network, outside: Outside, kept: bool) -> None:
    started = time.monotonic()
    stopping = asyncio.create_task(_until_asked_to_stop(kept))
    masked_proc = not spec.control_plane_only and check_containers()
    plane = ControlPlane(spec, net, lambda text: _progress(spec, text))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(plane.stop)
        admin = await plane.start(lambda client: crds.install(client, _crd_files(spec)))
        stack.push_async_callback(admin.close)
        await forward.serve(outside.api, lambda: (net.host, net.api_port))
        pair = plane.identity("admin-outside", "kubernetes-admin", ("system:masters",))
        server = outside.server if net.private else net.server
        write_kubeconfig(spec.kubeconfig, server, plane.ca.cert_path, pair)
        waits: list[asyncio.Future[None]] = [stopping]
        actions = outage.actions(plane)
        if not spec.control_plane_only:
            workload = Workload(plane, admin, masked_proc)
            stack.push_async_callback(workload.stop)
            waits.append(await _start_workload(workload, outside))
            actions |= workload.faults
        stack.push_async_callback((await control.serve(actions)).cleanup)
        _announce(spec, server, time.monotonic() - started)
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            each.result()


def _crd_files(spec: state.ClusterSpec) -> list[Path]:
    own = [] if spec.control_plane_only else [kubeflow.crd_file()]
    own += trainjob.crd_files() if "trainjob" in spec.extras else []
    return [*own, *(Path(each) for each in spec.crds)]


async def _start_workload(workload: Workload, outside: Outside) -> "asyncio.Future[None]":
    await workload.start()
    for text, listener in outside.forwards:
        await workload.forward(text, listener)
    return workload.failed


def _start(spec: state.ClusterSpec, lock: IO[str], kept: bool) -> None:
    outside = _outside(spec)
    lock.write(str(os.getpid()))
    lock.flush()
    net = network.host_network("") if spec.host_network else network.enter()
    if not net.private and not spec.host_network:
        _progress(spec, f"no private network: {net.why}; falling back to the host's")
        if not spec.control_plane_only:
            raise DevclusterError(
                f"nodes need network namespaces, and this machine gives none: {net.why}; "
                "next: `up --control-plane-only`, which runs on 127.0.0.1"
            )
    asyncio.run(_run(spec, net, outside, kept))


def main() -> int:
    """`python -m devcluster.supervisor STATE [--kept]`: hold the cluster until told to stop."""
    spec = state.load_spec(Path(sys.argv[1]))
    kept = "--kept" in sys.argv[2:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    lock = state.take_lock(spec)
    if lock is None:
        print(f"cluster {spec.name!r} is already running in {spec.state}", file=sys.stderr)
        return 1
    try:
        _start(spec, lock, kept)
    except (DevclusterError, ApiError, OSError) as error:
        log.exception("the cluster could not be started")
        spec.failed_file.write_text(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
