"""The fence before every write, and the watchdog behind a loop that hangs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from posttrain_operator.cluster.api import Api
from posttrain_operator.cluster.errors import Fenced
from posttrain_operator.cluster.writes import Write
from posttrain_operator.leader.fence import Fence
from posttrain_operator.leader.watchdog import EXIT_LOST, Watchdog

WRITE = Write("POST", "pods", "n", "x")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Sent(Api):
    """Notes what leaves the process."""

    def __init__(self, fence: Fence) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self.gates.append(fence)
        self.sent: list[str] = []
        self.answer = asyncio.Event()

    async def _ask(self, method: str, *_: Any) -> dict[str, Any]:
        self.sent.append(method)
        await self.answer.wait()
        return {}


async def test_only_a_leader_writes_and_everybody_reads() -> None:
    clock = Clock()
    fence = Fence(clock)
    api = Sent(fence)
    api.answer.set()
    with pytest.raises(Fenced):
        await api.request("POST", "/api/v1/namespaces/n/pods", body={})
    fence.allow(110)
    await api.request("POST", "/api/v1/namespaces/n/pods", body={})
    clock.now = 110
    for method in ("POST", "PATCH", "PUT", "DELETE"):
        with pytest.raises(Fenced, match="does not lead"):
            await api.request(method, "/api/v1/namespaces/n/pods/x", body={})
    await api.request("GET", "/api/v1/namespaces/n/pods")
    assert api.sent == ["POST", "GET"]


async def test_a_shut_fence_stays_shut() -> None:
    fence = Fence(Clock())
    fence.allow(200)
    fence.shut()
    fence.allow(300)
    with pytest.raises(Fenced):
        fence.before(WRITE)


async def test_what_is_under_way_is_waited_for() -> None:
    """The lease is given up only when nothing of ours can arrive after that."""
    fence = Fence(Clock())
    fence.allow(200)
    api = Sent(fence)
    writes = [asyncio.create_task(api.request("POST", "/api/v1/namespaces/n/pods", body={})) for _ in range(2)]
    await asyncio.sleep(0)
    fence.shut()
    assert not await fence.emptied(0.01)
    api.answer.set()
    assert await fence.emptied(1)
    await asyncio.gather(*writes)


async def test_a_write_that_fails_or_is_cancelled_is_under_way_no_more() -> None:
    fence = Fence(Clock())
    fence.allow(200)
    api = Sent(fence)
    write = asyncio.create_task(api.request("POST", "/api/v1/namespaces/n/pods", body={}))
    await asyncio.sleep(0)
    write.cancel()
    await asyncio.gather(write, return_exceptions=True)
    assert await fence.emptied(0.01)


async def test_who_never_led_is_never_overdue() -> None:
    clock = Clock()
    fence = Fence(clock)
    assert fence.overdue() < 0
    fence.allow(105)
    assert fence.overdue() == -5
    clock.now = 107
    assert fence.overdue() == 2


async def test_the_watchdog_lets_a_stopped_one_be() -> None:
    ends: list[int] = []
    fence = Fence(lambda: 100.0)
    dog = Watchdog(fence, ends.append)
    dog.start()
    fence.allow(50)
    await asyncio.sleep(0.3)
    assert ends == [EXIT_LOST]
    quiet = Watchdog(fence, ends.append)
    quiet.stop()
    quiet.start()
    await asyncio.sleep(0.3)
    assert ends == [EXIT_LOST]


HANGING = """
import asyncio, time
from posttrain_operator.leader.fence import Fence, local_clock
from posttrain_operator.leader.watchdog import Watchdog
async def main():
    fence = Fence()
    Watchdog(fence).start()
    fence.allow(local_clock() + 0.2)
    print("leads", flush=True)
    time.sleep(60)  # the event loop hangs
asyncio.run(main())
"""


def test_a_hanging_loop_ends_with_its_lease(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HANGING], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "leads\n"
    begun = time.monotonic()
    assert process.wait(30) == EXIT_LOST
    assert time.monotonic() - begun < 30
