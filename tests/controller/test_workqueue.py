"""The queue's rules, tried in every order: no key twice at once, no hint lost."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from posttrain_operator.workqueue import Backoff, KeyQueue, WorkQueue

KEYS = st.sampled_from("abc")


class QueueRules(RuleBasedStateMachine):
    """`wanted`: keys added since they were last taken; `due`: the earliest delayed wish of a key."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: KeyQueue[str] = KeyQueue()
        self.now = 0.0
        self.wanted: set[str] = set()
        self.busy: set[str] = set()
        self.due: dict[str, float] = {}

    @rule(key=KEYS)
    def add(self, key: str) -> None:
        self.queue.add(key)
        self.wanted.add(key)

    @rule(key=KEYS, delay=st.floats(0.1, 10))
    def add_later(self, key: str, delay: float) -> None:
        self.queue.add_at(key, self.now + delay)
        self.due[key] = min(self.due.get(key, self.now + delay), self.now + delay)

    @rule(step=st.floats(0, 5))
    def time_passes(self, step: float) -> None:
        self.now += step

    @rule()
    def take(self) -> None:
        for key, moment in list(self.due.items()):
            if moment <= self.now:
                del self.due[key]
                self.wanted.add(key)
        key = self.queue.pop(self.now)
        if key is None:
            assert self.wanted <= self.busy
            return
        assert key in self.wanted
        assert key not in self.busy
        self.wanted.discard(key)
        self.busy.add(key)

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.busy)))
        self.busy.discard(key)
        self.queue.done(key)

    @invariant()
    def knows_when_to_wake_up(self) -> None:
        assert self.queue.next_due() == (min(self.due.values()) if self.due else None)


TestQueueRules = QueueRules.TestCase


@given(st.integers(0, 40), st.floats(0, 1))
def test_backoff_doubles_up_to_the_limit(failures: int, chance: float) -> None:
    backoff: Backoff[str] = Backoff(1.0, 300.0, lambda: chance)
    for _ in range(failures):
        backoff.failed("a")
    full = min(300.0, 2.0**failures)
    assert full / 2 <= backoff.failed("a") <= full
    backoff.succeeded("a")
    assert backoff.failed("a") <= 1.0


async def test_workers_wait_for_keys_and_for_time() -> None:
    queue: WorkQueue[str] = WorkQueue(Backoff(0.01, 1))
    taken: list[str] = []

    async def work() -> None:
        while True:
            key = await queue.get()
            taken.append(key)
            queue.done(key)

    workers = [asyncio.create_task(work()) for _ in range(3)]
    queue.add_after("late", 0.05)
    queue.add("early")
    queue.retry("failed")
    async with asyncio.timeout(5):
        while len(taken) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert taken == ["early", "failed", "late"]
    for worker in workers:
        worker.cancel()


async def test_a_key_added_while_it_is_worked_on_runs_again() -> None:
    queue: WorkQueue[str] = WorkQueue(Backoff(1, 1))
    queue.add("a")
    assert await queue.get() == "a"
    queue.add("a")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await queue.get()
    queue.done("a")
    async with asyncio.timeout(1):
        assert await queue.get() == "a"
