"""A pod's status as a kubelet reports it, computed from what its containers do. Pure: no clock, no I/O.

The pod worker keeps one `PodState` per pod and sends `render(...)` after each change. What matters to controllers is
here: phases, the conditions and their transition times, exit codes, restart counts and termination messages.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

Obj = dict[str, Any]


def stamp(when: datetime) -> str:
    """RFC 3339 with seconds, as Kubernetes writes times."""
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Terminated:
    """How a container ended."""

    exit_code: int
    reason: str
    message: str
    started_at: str
    finished_at: str
    container_id: str = ""

    def render(self) -> Obj:
        """As a `state.terminated` value."""
        shown = {
            "exitCode": self.exit_code,
            "reason": self.reason,
            "message": self.message,
            "startedAt": self.started_at or None,
            "finishedAt": self.finished_at or None,
            "containerID": self.container_id,
        }
        return {key: value for key, value in shown.items() if value not in ("", None)}


@dataclass
class ContainerState:
    """One container: waiting until it has started, then running, then terminated."""

    name: str
    image: str
    waiting: tuple[str, str] | None = ("ContainerCreating", "")
    started_at: str = ""
    terminated: Terminated | None = None
    last: Terminated | None = None
    restarts: int = 0
    ready: bool = False
    started: bool = False
    container_id: str = ""

    @property
    def running(self) -> bool:
        return self.waiting is None and self.terminated is None

    def _state(self) -> Obj:
        if self.terminated is not None:
            return {"terminated": self.terminated.render()}
        if self.waiting is not None:
            reason, message = self.waiting
            return {"waiting": {"reason": reason, **({"message": message} if message else {})}}
        return {"running": {"startedAt": self.started_at}}

    def render(self, init: bool) -> Obj:
        """As an entry of containerStatuses or initContainerStatuses."""
        succeeded = self.terminated is not None and self.terminated.exit_code == 0
        return {
            "name": self.name,
            "image": self.image,
            "imageID": self.image if self.container_id else "",
            "containerID": self.container_id,
            "restartCount": self.restarts,
            "ready": succeeded if init else self.ready,
            "started": self.started,
            "state": self._state(),
            "lastState": {"terminated": self.last.render()} if self.last else {},
        }


@dataclass
class PodState:
    """All that the status is made of."""

    host_ip: str
    inits: list[ContainerState]
    mains: list[ContainerState]
    restart_policy: str = "Always"
    started_at: str = ""
    pod_ip: str = ""
    failed: tuple[str, str] | None = None
    stopped: bool = False
    transitions: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def initialized(self) -> bool:
        return all(each.terminated is not None and each.terminated.exit_code == 0 for each in self.inits)

    def is_finished(self) -> bool:
        """Nothing runs and nothing will."""
        return self.phase() in ("Succeeded", "Failed")

    def phase(self) -> str:
        """Pending, Running, Succeeded or Failed. A stopped pod (one that is deleted) ends whatever its policy says."""
        codes = [each.terminated.exit_code if each.terminated else None for each in self.mains]
        if self.failed is not None or self._init_failed():
            return "Failed"
        if self.stopped:
            return "Failed" if any(code is None or code for code in codes) else "Succeeded"
        if not self.initialized or all(each.waiting and each.last is None for each in self.mains):
            return "Pending"
        if any(code is None for code in codes) or self.restart_policy == "Always":
            return "Running"
        if self.restart_policy == "OnFailure" and any(codes):
            return "Running"
        return "Failed" if any(codes) else "Succeeded"

    def _init_failed(self) -> bool:
        bad = [each for each in self.inits if each.terminated and each.terminated.exit_code != 0]
        return bool(bad) and self.restart_policy == "Never"


def resume(state: PodState, status: Obj, now: str) -> None:
    """Take a pod up again whose node was gone meanwhile: its containers were killed by that.

    With restartPolicy Never the pod has failed; otherwise they start again and the restart is counted.
    """
    for each, old in zip(state.inits, status.get("initContainerStatuses") or [], strict=False):
        ended = (old.get("state") or {}).get("terminated")
        if ended and ended["exitCode"] == 0:
            each.waiting, each.terminated = None, Terminated(0, "Completed", "", "", ended.get("finishedAt") or now)
    for each, old in zip(state.mains, status.get("containerStatuses") or [], strict=False):
        if "waiting" in (old.get("state") or {}):
            continue
        lost = Terminated(137, "ContainerStatusUnknown", "the container was lost with its node", "", now)
        each.restarts = int(old.get("restartCount") or 0)
        if state.restart_policy == "Never":
            each.waiting, each.terminated = None, lost
        else:
            each.last, each.restarts = lost, each.restarts + 1


def _not_ready(state: PodState) -> tuple[str, str]:
    if state.phase() == "Succeeded":
        return "PodCompleted", ""
    if state.phase() == "Failed":
        return "PodFailed", ""
    names = [each.name for each in state.mains if not each.ready]
    return "ContainersNotReady", f"containers with unready status: [{' '.join(names)}]"


def _conditions(state: PodState, now: str) -> list[Obj]:
    ready = bool(state.mains) and all(each.ready for each in state.mains) and not state.is_finished()
    why = ("", "") if ready else _not_ready(state)
    pending = [each.name for each in state.inits if not (each.terminated and each.terminated.exit_code == 0)]
    init_why = ("ContainersNotInitialized", f"containers with incomplete status: [{' '.join(pending)}]")
    wanted = [
        ("PodReadyToStartContainers", bool(state.pod_ip) and not state.is_finished(), ("", "")),
        ("Initialized", state.initialized, ("", "") if state.initialized else init_why),
        ("ContainersReady", ready, why),
        ("Ready", ready, why),
        ("PodScheduled", True, ("", "")),
    ]
    return [_condition(state, now, *each) for each in wanted]


def _condition(state: PodState, now: str, kind: str, holds: bool, why: tuple[str, str]) -> Obj:
    status = str(holds)
    known = state.transitions.get(kind)
    if known is None or known[0] != status:
        state.transitions[kind] = known = (status, now)
    # Empty strings on purpose: a merge patch must take an earlier reason away.
    return {"type": kind, "status": status, "lastTransitionTime": known[1], "reason": why[0], "message": why[1]}


def render(state: PodState, now: str) -> Obj:
    """The status to send, for a strategic merge patch. Records transition times in `state`."""
    shown: Obj = {
        "phase": state.phase(),
        "conditions": _conditions(state, now),
        "hostIP": state.host_ip,
        "hostIPs": [{"ip": state.host_ip}],
        "startTime": state.started_at or now,
        "containerStatuses": [each.render(False) for each in state.mains],
        "initContainerStatuses": [each.render(True) for each in state.inits],
    }
    if state.pod_ip:
        shown |= {"podIP": state.pod_ip, "podIPs": [{"ip": state.pod_ip}]}
    if state.failed:
        shown |= {"reason": state.failed[0], "message": state.failed[1]}
    return shown
