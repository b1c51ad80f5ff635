"""The session of the watches, read by kopf's own reader from a server that breaks off, tells of errors, ends early."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from kopf._cogs.clients.api import iter_jsonlines

from posttrain_operator.cluster.streams import SHORT_LIFE, Pace, WatchResponse
from posttrain_operator.watch import Streams

ADDED = b'{"type":"ADDED","object":{"metadata":{"name":"a","note":"{\\"type\\":\\"ERROR\\"}"}}}\n'
GONE = b'{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}\n'
BROKEN = b'{"type":"ERROR","object":{"kind":"Status","code":500,"message":"etcdserver: leader changed"}}\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*parts: bytes, clean: bool = True) -> bytes:
    """An HTTP answer of these pieces; `clean` ends it as HTTP wants, else the connection just ends."""
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return HEAD + body + (b"0\r\n\r\n" if clean else b"")


@asynccontextmanager
async def serving(answer: bytes) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jobs"


async def lines_of(answer: bytes, query: str = "?watch=true") -> list[str]:
    """The types of the events that kopf would see before the stream ends."""
    async with (
        serving(answer) as url,
        aiohttp.ClientSession(response_class=WatchResponse) as session,
        session.get(url + query) as response,
    ):
        return [json.loads(line)["type"] async for line in iter_jsonlines(response.content)]


async def test_whole_lines_pass_however_they_are_cut_up() -> None:
    pieces = [ADDED[:7], ADDED[7:] + ADDED[:30], ADDED[30:]]
    assert await lines_of(chunked(*pieces)) == ["ADDED", "ADDED"]


async def test_half_a_line_at_the_end_is_not_told() -> None:
    """As it came, kopf would try to read it as JSON and end for good."""
    assert await lines_of(chunked(ADDED, ADDED[:40])) == ["ADDED"]


async def test_a_stream_that_breaks_off_is_an_error_that_kopf_knows() -> None:
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
        await lines_of(chunked(ADDED, ADDED[:40], clean=False))


async def test_an_old_version_is_told_and_another_error_ends_the_stream() -> None:
    assert await lines_of(chunked(ADDED, GONE)) == ["ADDED", "ERROR"]
    with pytest.raises(aiohttp.ClientPayloadError, match="leader changed"):
        await lines_of(chunked(ADDED + BROKEN))


async def test_what_is_no_watch_is_left_alone() -> None:
    assert await lines_of(chunked(BROKEN), query="") == ["ERROR"]


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lived(pace: Pace, time: Time, seconds: float) -> float:
    """A stream is opened, lives, ends; returns the wait before it is opened again."""
    pace.opened("/jobs")
    time.now += seconds
    return pace.delay("/jobs")


def test_a_stream_that_keeps_ending_at_once_is_held_back_more_and_more() -> None:
    time = Time()
    pace = Pace(first=0.5, limit=30, clock=time)
    waits = [lived(pace, time, 0.01) for _ in range(10)]
    assert all(0.25 * 2**number <= wait <= 0.5 * 2**number for number, wait in enumerate(waits[:6]))
    assert all(15 <= wait <= 30 for wait in waits[7:])
    assert lived(pace, time, SHORT_LIFE) == 0
    assert lived(pace, time, 0.01) <= 0.5


def test_what_never_opened_has_a_backoff_of_its_own() -> None:
    pace = Pace(clock=Time())
    assert pace.delay("/jobs") == 0
    pace.opened("/jobs")
    assert pace.delay("/pods") == 0
    assert pace.delay("/jobs") > 0
    assert pace.delay("/jobs") == 0


async def test_the_streams_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened is what answered 200 to a watch; the second of two short ones waits, and no list."""
    slept: list[float] = []
    pause: Callable[[float], object] = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if seconds > 0:
            assert streams.lives == {}, "it is not open while it waits"
        await pause(0)  # type: ignore[misc]

    streams = Streams(Pace(first=0.5))
    async with (
        serving(chunked(ADDED)) as url,
        aiohttp.ClientSession(trace_configs=[streams.trace()], response_class=WatchResponse) as session,
    ):
        monkeypatch.setattr("posttrain_operator.watch.asyncio.sleep", sleep)
        for query, waited, life in (("", 0, None), ("?watch=true", 0, 1), ("", 0, None), ("?watch=true", 1, 2)):
            async with session.get(url + query) as response:
                await response.read()
            assert len([seconds for seconds in slept if seconds > 0]) == waited
            assert streams.lives.get("/jobs") == life
    assert streams.opened == {"/jobs"}
