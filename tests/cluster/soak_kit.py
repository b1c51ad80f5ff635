"""Short jobs with random faults, played by the status runner: each has a story, and the story says how it must end.

Everything random comes from one seed. The operator is the real process; what a pod does is a line in a story.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmarks import operator_objects as objects
from benchmarks.operator_objects import Obj
from benchmarks.operator_runner import Ending
from devcluster.api import MERGE, ApiError, Client, Informer
from posttrain_api.reasons import Reason, exit_code_of
from posttrain_api.records import Failure, render_termination

SOON = 0.2
"""Seconds from the moment when all pods run until one of them ends."""
_KILLED = (134, 137, 139, 160, 162, 200, 255)
_PERMANENT = (
    Reason.DATASET_SCHEMA_INVALID,
    Reason.DATA_ROWS_REJECTED,
    Reason.NON_FINITE,
    Reason.STORAGE_FULL,
    Reason.ACCELERATOR_OUT_OF_MEMORY,
    Reason.MODEL_NOT_FOUND,
)
Attempt = tuple[Ending, ...]


@dataclass(frozen=True)
class Story:
    """What happens to a job. `attempts`: the ends of each attempt's pods, the last also of all later ones; `deed`: what
    a person does while it runs; `state`: how it must end, empty where it must be gone; `reasons`: of a failure."""

    title: str
    attempts: tuple[Attempt, ...] = ((),)
    deed: str = ""
    state: str = "Succeeded"
    reasons: frozenset[str] = frozenset()
    spec: dict[str, Any] = field(default_factory=dict)


def _well() -> Attempt:
    return (
        Ending("worker", 0, 0, after=SOON),
        Ending("master", 0, 0, objects.success(), after=SOON),
    )


def _one(code: int, message: str = "", reason: str = "", role: str = "worker") -> Attempt:
    """One pod ends; where that is no end of the job, the other loses its peer a moment later, as the launcher does."""
    end = Ending(role, 0, code, message, reason, after=SOON)
    if code < 128:
        return (end,)
    return (end, Ending("master" if role == "worker" else "worker", 0, 160, after=5 * SOON))


def _told(reason: Reason, step: int = 3) -> str:
    return render_termination(Failure(reason=reason, message="so it was", exit_code=exit_code_of(reason), step=step))


def draw(chance: random.Random) -> Story:
    """One story."""
    return chance.choice(_STORIES)(chance)


def _killed(chance: random.Random) -> Story:
    code, role = chance.choice(_KILLED), chance.choice(("master", "worker"))
    return Story(f"{role} exits {code}", (_one(code, role=role), _well()))


def _killed_twice(chance: random.Random) -> Story:
    role = chance.choice(("master", "worker"))
    return Story("two restarts", (_one(160, role=role), _one(137, reason="OOMKilled"), _well()))


def _permanent(chance: random.Random) -> Story:
    reason, role = chance.choice(_PERMANENT), chance.choice(("master", "worker"))
    ends = _one(exit_code_of(reason), _told(reason), role=role)
    # Where no operator saw the pod end, only the code may be left, or nothing but the child's own verdict.
    return Story(f"{role} ends with {reason}", (ends,), state="Failed", reasons=frozenset({reason, "InternalError"}))


def _stories() -> tuple[Callable[[random.Random], Story], ...]:
    trainer_error = (_one(190, _told(Reason.TRAINER_ERROR)),)
    twice = frozenset({"TrainerError", "RestartBudgetExhausted"})
    endless: tuple[Attempt, ...] = ((), _well())
    fixed = (
        Story("succeeds", (_well(),)),
        Story("exits 1", (_one(1),), state="Failed", reasons=frozenset({"InternalError"})),
        Story("no record", (_one(0, role="master"),), state="Failed", reasons=frozenset({"InternalError"})),
        Story("the same error twice", trainer_error, state="Failed", reasons=twice),
        Story("a pod is drained", endless, deed="drain"),
        Story("a pod is torn away", endless, deed="tear"),
        Story("suspended and resumed", endless, deed="suspend"),
        Story("its child is deleted", endless, deed="orphan"),
        Story("deleted", ((),), deed="delete", state=""),
        Story("held from the beginning", ((),), state="Suspended", spec={"suspend": True}),
    )
    return (*(lambda _, story=story: story for story in fixed), _killed, _killed, _killed_twice, _permanent, _permanent)


_STORIES = _stories()


class People:
    """Users and administrators: they do each story's deed once the job runs, and resume what they have suspended."""

    def __init__(self, client: Client, namespace: str, stories: dict[str, Story]) -> None:
        self._client, self._stories = client, stories
        self._jobs, self._pods = objects.JOBS.format(namespace), objects.PODS.format(namespace)
        self._children = objects.CHILDREN.format(namespace)
        self._done: set[str] = set()
        self._resumed: set[str] = set()
        self._busy: set[asyncio.Task[None]] = set()
        self.errors: list[str] = []
        self.jobs = Informer(client, self._jobs, {}, self._changed)

    def _changed(self, kind: str, job: Obj) -> None:
        name, state = job["metadata"]["name"], (job.get("status") or {}).get("state")
        story = self._stories.get(name)
        if kind == "DELETED" or story is None or not story.deed:
            return
        if state == "Running" and name not in self._done:
            self._done.add(name)
            self._act(name, story.deed)
        elif state == "Suspended" and name in self._done and name not in self._resumed:
            self._resumed.add(name)
            self._act(name, "resume")

    def _act(self, name: str, deed: str) -> None:
        task = asyncio.create_task(self._do(name, deed))
        self._busy.add(task)
        task.add_done_callback(self._acted)

    def _acted(self, task: asyncio.Task[None]) -> None:
        self._busy.discard(task)
        if not task.cancelled() and task.exception():
            self.errors.append(str(task.exception()))

    async def _do(self, name: str, deed: str) -> None:
        await asyncio.sleep(SOON)
        job, worker = f"{self._jobs}/{name}", f"{self._pods}/{name}-worker-0"
        try:
            if deed == "drain":
                await self._client.delete(worker)
            elif deed == "tear":
                await self._client.delete(worker, {"gracePeriodSeconds": 0})
            elif deed == "orphan":
                await self._client.delete(f"{self._children}/{name}", {"propagationPolicy": "Background"})
            elif deed == "delete":
                await self._client.delete(job, {"propagationPolicy": "Background"})
            else:
                await self._client.patch(job, {"spec": {"suspend": deed == "suspend"}}, MERGE)
        except ApiError as error:
            if error.code != 404:  # it went by itself meanwhile
                raise

    def job(self, namespace: str, name: str) -> Obj | None:
        """As it was last seen."""
        return self.jobs.store.get(f"{namespace}/{name}")


def verdict(name: str, story: Story, job: Obj | None) -> str:
    """What is wrong with how a job ended; empty where nothing is."""
    status = (job or {}).get("status") or {}
    state, reason = str(status.get("state", "")), str(status.get("reason", ""))
    if state != story.state:
        found = f"{state or 'gone'} ({reason}: {status.get('message')})"
        return f"{name} ({story.title}): {found}, not {story.state or 'gone'}"
    if story.reasons and reason not in story.reasons:
        return (
            f"{name} ({story.title}): failed for {reason}, not one of {sorted(story.reasons)}: {status.get('message')}"
        )
    restarts = (status.get("restarts") or {}).get("total", 0)
    if restarts > 6:
        return f"{name} ({story.title}): {restarts} restarts"
    return ""


def settled(stories: dict[str, Story], look: Callable[[str], Obj | None]) -> Iterable[str]:
    """The jobs that are not yet where they stay."""
    for name, story in stories.items():
        state = str(((look(name) or {}).get("status") or {}).get("state", ""))
        gone = look(name) is None
        if not (gone if story.state == "" else state in ("Succeeded", "Failed") or state == story.state):
            yield name
