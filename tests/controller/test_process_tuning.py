"""The process's own settings reach what they are meant for: in a process of its own, because they are for good."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import asyncio, gc, ssl
from asyncio import sslproto
from posttrain_operator.process import tune

async def buffer():
    protocol = sslproto.SSLProtocol(
        asyncio.get_running_loop(), asyncio.Protocol(), ssl.create_default_context(), None, server_hostname="x"
    )
    return len(protocol._ssl_buffer)

before = asyncio.run(buffer())
tune()
print(before, asyncio.run(buffer()), gc.get_freeze_count() > 10_000, gc.get_threshold()[0])
"""


def test_a_connection_has_a_small_buffer_and_garbage_is_left_longer() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(256 * 1024), str(32 * 1024), "True", "50000"]
