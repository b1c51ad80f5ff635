"""Components that die and come back: etcd, the API server, a controller. What a control plane suffers in its own life.

Spoken to through the control socket, as `faults` is; a control plane without nodes has these and nothing else. A
component that is started again gets the arguments it had, and its data: etcd keeps what it had written.
"""

import signal
from functools import partial
from typing import Any

from devcluster.control import Bound, Refused
from devcluster.controlplane import ControlPlane


def _component(plane: ControlPlane, ask: dict[str, Any]) -> str:
    name = str(ask["name"])
    if name not in plane.running:
        raise Refused(f"no component {name!r}; there are {', '.join(plane.running)}")
    return name


async def stop_component(plane: ControlPlane, ask: dict[str, Any]) -> str:
    """Send a signal (default KILL) to a component and return when it is gone."""
    name = _component(plane, ask)
    number = signal.Signals[f"SIG{str(ask.get('signal', 'KILL')).removeprefix('SIG')}"]
    process = plane.running[name]
    if process.returncode is not None:
        raise Refused(f"{name} does not run")
    process.send_signal(number)
    await process.wait()
    return f"{name} is gone"


async def start_component(plane: ControlPlane, ask: dict[str, Any]) -> str:
    """Start a component that was stopped, as it was started before; it may take a while until it answers."""
    name = _component(plane, ask)
    if plane.running[name].returncode is None:
        raise Refused(f"{name} runs already")
    await plane.again(name)
    return f"{name} is started"


def actions(plane: ControlPlane) -> dict[str, Bound]:
    """By the names that are asked for."""
    return {"stop-component": partial(stop_component, plane), "start-component": partial(start_component, plane)}
