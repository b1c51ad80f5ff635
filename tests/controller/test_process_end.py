"""The process ends where a part of it fails, also where something in it cannot be cancelled."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from posttrain_operator.watch import _until_one_ends

STUBBORN = """
import asyncio, sys
from posttrain_operator import __main__ as process

async def stubborn():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

async def run(settings):
    global kept
    kept = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    return 3

process.run = run
sys.exit(asyncio.run(process._whole(None)))
"""


async def _for_ever(until: asyncio.Event) -> None:
    """As kopf's watchers wait for a login that nobody gives: a cancellation does not reach them."""
    while not until.is_set():
        try:
            await until.wait()
        except asyncio.CancelledError:
            continue


async def _fails() -> None:
    raise RuntimeError("a line that is no JSON")


async def test_the_first_failure_is_told_at_once() -> None:
    over = asyncio.Event()
    waiting, failing = asyncio.create_task(_for_ever(over)), asyncio.create_task(_fails())
    running = asyncio.create_task(_for_ever(over))  # as kopf's own wait, which is for all of them
    asyncio.get_running_loop().call_later(6, over.set)  # or a failure of this test would wait for ever too
    try:
        with pytest.raises(RuntimeError, match="no JSON"):
            await asyncio.wait_for(_until_one_ends([waiting, failing], running), 5)
    finally:
        over.set()
        await asyncio.gather(waiting, running)


def test_what_cannot_be_cancelled_does_not_keep_the_process() -> None:
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", STUBBORN], timeout=60, check=False)
    assert done.returncode == 3
    assert time.monotonic() - begun < 50
