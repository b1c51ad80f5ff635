"""Startup, readiness and liveness probes of one container: exec, HTTP and TCP. gRPC probes are not supported.

`watch` runs while the container runs. It writes `ready` and `started` into the container's state and calls back; a
failed startup or liveness probe asks for the container to be killed.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp

from devcluster.api import Obj
from devcluster.containers import Container
from devcluster.podstatus import ContainerState


@dataclass(frozen=True)
class Target:
    """What is probed, and whom to tell. `failed(kind, message)` hears each failed try."""

    spec: Obj
    container: Container
    state: ContainerState
    address: str
    changed: Callable[[], Awaitable[None]]
    failed: Callable[[str, str], Awaitable[None]]


def _port(spec: Obj, port: str | int) -> int:
    for each in spec.get("ports") or []:
        if each.get("name") == port:
            return int(each["containerPort"])
    return int(port)


async def _http(target: Target, action: Obj) -> str:
    scheme = str(action.get("scheme") or "HTTP").lower()
    host = action.get("host") or target.address
    url = f"{scheme}://{host}:{_port(target.spec, action['port'])}{action.get('path') or '/'}"
    headers = {each["name"]: each["value"] for each in action.get("httpHeaders") or []}
    try:
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers, ssl=False) as answer:
            return "" if 200 <= answer.status < 400 else f"HTTP probe failed with statuscode: {answer.status}"
    except aiohttp.ClientError as error:
        return f'Get "{url}": {error}'


async def _tcp(target: Target, action: Obj) -> str:
    host, port = action.get("host") or target.address, _port(target.spec, action["port"])
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        return f"dial tcp {host}:{port}: {error}"
    writer.close()
    return ""


async def _exec(target: Target, action: Obj) -> str:
    command = target.container.exec_command(action["command"])
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended at this very moment
                process.kill()
    return "" if process.returncode == 0 else output.decode(errors="replace")[-1000:] or "exec probe failed"


async def attempt(target: Target, probe: Obj) -> str:
    """One try; '' for success, else what a kubelet would say."""
    for key, action in (("httpGet", _http), ("tcpSocket", _tcp), ("exec", _exec)):
        if key in probe:
            try:
                return await asyncio.wait_for(action(target, probe[key]), probe.get("timeoutSeconds") or 1)
            except TimeoutError:
                return f"probe timed out after {probe.get('timeoutSeconds') or 1} s"
    return f"probe kind {sorted(probe)} is not supported by devcluster"


class _Counter:
    """Turns single results into a verdict by failureThreshold and successThreshold."""

    def __init__(self, probe: Obj) -> None:
        self._need = {True: probe.get("successThreshold") or 1, False: probe.get("failureThreshold") or 3}
        self._last, self._count = None, 0

    def verdict(self, good: bool) -> bool | None:
        self._count = self._count + 1 if self._last is good else 1
        self._last = good  # type: ignore[assignment]
        return good if self._count >= self._need[good] else None


async def _until(target: Target, kind: str, probe: Obj, decided: Callable[[bool], Awaitable[bool]]) -> None:
    counter = _Counter(probe)
    await asyncio.sleep(probe.get("initialDelaySeconds") or 0)
    while True:
        message = await attempt(target, probe)
        if message:
            await target.failed(kind, message)
        verdict = counter.verdict(not message)
        if verdict is not None and await decided(verdict):
            return
        await asyncio.sleep(probe.get("periodSeconds") or 10)


async def _readiness(target: Target, probe: Obj) -> None:
    async def decided(good: bool) -> bool:
        if target.state.ready != good:
            target.state.ready = good
            await target.changed()
        return False

    await _until(target, "Readiness", probe, decided)


async def _killing(target: Target, kind: str, probe: Obj, until_good: bool) -> bool:
    """Run a startup or liveness probe; returns False when it asks for the container's end."""
    result = True

    async def decided(good: bool) -> bool:
        nonlocal result
        result = good
        return not good or until_good

    await _until(target, kind, probe, decided)
    return result


async def watch(target: Target) -> bool:
    """Run the container's probes until one of them asks for its end (False), or for ever. Cancel it at its exit."""
    spec, state = target.spec, target.state
    if "startupProbe" in spec and not await _killing(target, "Startup", spec["startupProbe"], True):
        return False
    state.started = True
    state.ready = "readinessProbe" not in spec
    await target.changed()
    async with contextlib.AsyncExitStack() as stack:
        if "readinessProbe" in spec:
            task = asyncio.create_task(_readiness(target, spec["readinessProbe"]))
            stack.callback(task.cancel)
        if "livenessProbe" in spec:
            return await _killing(target, "Liveness", spec["livenessProbe"], False)
        await asyncio.Event().wait()
    return True
