"""The status server and a job that stands still: its wishes, heartbeats of every pod, stacks and where they end up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_cluster import START, Cluster
from statusserver_rig import Rig, pod, running

from posttrain_api import names
from posttrain_api.records import MAX_STACKS, MAX_STACKS_BYTES, Report
from posttrain_operator import clock
from posttrain_operator.cache import Cache
from posttrain_operator.jobview import CacheView
from posttrain_operator.slim import job_record
from posttrain_operator.statusserver import progress
from posttrain_operator.statusserver.bodies import Incoming

HEARTBEAT = names.STATUS_PATH.rpartition("/")[0] + "/" + names.STATUS_HEARTBEAT
TEXT = 'sleep (stub.py:7)\nprocess 12: state S\nThread 0x1 (most recent call first):\n  File "stub.py", line 7 in sleep'


def stacks_path(rank: Any) -> str:
    return f"{names.STATUS_PATH.rpartition('/')[0]}/{names.STATUS_STACKS}/{rank}"


def stands_still(rig: Rig, dump: bool = True) -> None:
    """Reconcile has written its wish: every replica's cache shows it."""
    job = rig.cluster.jobs["team", "job"]
    heard = {"phase": "Training", "step": 3, "lastUpdateTime": progress.rfc3339(datetime.now(UTC))}
    rig.cluster.jobs["team", "job"] = replace(job, dump=dump, stall_seconds=600, progress=job.progress or heard)
    rig.cluster.pods["team", "job"] = frozenset({"p1", "p2"})
    rig.cluster.tokens["second"] = pod("job-worker-0", "p2")


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


async def test_every_pod_hears_of_the_wish() -> None:
    async with running() as rig:
        assert (await rig.post(b"{}", path=HEARTBEAT))[1] == {"accepted": True, "dump": False, "stallSeconds": 1800}
        stands_still(rig)
        assert (await rig.post(b"{}", path=HEARTBEAT, token="second"))[1]["dump"] is True
        assert (await rig.post())[1]["stallSeconds"] == 600
        assert len(rig.cluster.writes) <= 1  # heartbeats of other pods write nothing


async def test_a_heartbeat_is_authorised_as_a_report_is() -> None:
    async with running() as rig:
        assert (await rig.post(b"{}", path=HEARTBEAT, token="neighbour"))[0] == 403
        assert (await rig.post(b"{}", path=HEARTBEAT, token=None))[0] == 401
        assert (await rig.post(b"{}", path=HEARTBEAT, name="done"))[0] == 409


async def test_stacks_become_places_in_the_status_and_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as rig:
        stands_still(rig)
        assert (await rig.post(TEXT.encode(), path=stacks_path(0)))[0] == 200
        text = TEXT.replace("sleep", "\x1b[31mload", 1).encode()
        assert (await rig.post(text, path=stacks_path(1), token="second"))[0] == 200
        await until(lambda: len(rig.cluster.writes[-1:] and rig.cluster.writes[-1].get("stacks", ())) == 2)
        assert rig.cluster.writes[-1]["stacks"] == [
            {"rank": 0, "where": "sleep (stub.py:7)"},
            {"rank": 1, "where": "�[31mload (stub.py:7)"},
        ]
        assert rig.cluster.writes[-1]["step"] == 3  # the rest of the progress is as it was
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert any("team/job: rank 1 in pod job-worker-0 stands still" in line for line in said)
        assert not any("\x1b" in line for line in said)
        await rig.post(TEXT.encode(), path=stacks_path(0))  # told twice, logged once
        assert len([line for line in caplog.messages if "rank 0 in pod" in line]) == 1


async def test_stacks_stay_while_reports_go_on_and_go_with_the_wish() -> None:
    async with running() as rig:
        stands_still(rig)
        await rig.post(TEXT.encode(), path=stacks_path(0))
        await until(lambda: rig.cluster.writes)
        await rig.post({"phase": "Saving", "step": 3})
        await until(lambda: rig.cluster.writes[-1]["phase"] == "Saving")
        assert rig.cluster.writes[-1]["stacks"]
        stands_still(rig, dump=False)
        await rig.post({"phase": "Training", "step": 4})
        await until(lambda: rig.cluster.writes[-1]["step"] == 4)
        assert "stacks" not in rig.cluster.writes[-1]


async def test_stacks_that_nobody_asked_for_are_refused() -> None:
    async with running() as rig:
        code, answer, _ = await rig.post(TEXT.encode(), path=stacks_path(0))
        assert (code, answer["reason"]) == (409, "NotAsked")


@pytest.mark.parametrize(
    ("rank", "body", "code"),
    [("-1", b"x", 422), ("one", b"x", 422), (2**31, b"x", 422), (0, b"x" * (MAX_STACKS_BYTES + 1), 413)],
)
async def test_stacks_that_are_none(rank: Any, body: bytes, code: int) -> None:
    async with running() as rig:
        stands_still(rig)
        assert (await rig.post(body, path=stacks_path(rank)))[0] == code


async def test_a_neighbour_may_send_no_stacks() -> None:
    async with running() as rig:
        stands_still(rig)
        assert (await rig.post(TEXT.encode(), path=stacks_path(0), token="neighbour"))[0] == 403


async def test_a_job_that_begins_to_stand_still_is_written_at_once() -> None:
    """Heartbeats alone are written once a minute; the one that makes it a hang is not kept back."""
    async with running() as rig:
        rig.cluster.jobs["team", "job"] = replace(rig.cluster.jobs["team", "job"], stall_seconds=600)
        await rig.post({"phase": "Training", "step": 3, "idleSeconds": 599.8})
        await until(lambda: rig.cluster.writes)
        await asyncio.sleep(0.5)
        await rig.post({"phase": "Training", "step": 3, "idleSeconds": 600.3})
        await until(lambda: progress.idle_seconds(rig.cluster.writes[-1]) > 600)


def test_the_wish_is_read_from_the_status_alone() -> None:
    """A replica knows nothing but its cache."""
    cluster = Cluster()
    cache = Cache()

    def dump(**status: Any) -> bool:
        cluster.job["status"] = status
        cluster._touch(cluster.job)
        cache.put_job(job_record(cluster.job))
        view = CacheView(cache).job("ns", "job")
        assert view is not None
        return view.dump

    since = {"number": 1, "stalledTime": clock.render(START)}
    assert dump(attempts=1, attempt=since) is True
    assert dump(attempts=2, attempt=since) is False  # the restart is decided
    assert dump(attempts=1, attempt={"number": 1}) is False
    ended = [{"type": "Failed", "status": "True", "reason": "X"}]
    assert dump(attempts=1, attempt=since, conditions=ended) is False


NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def heard(idle: float, after: float, before: dict[str, Any] | None = None) -> dict[str, Any]:
    report = Incoming(Report(phase="Training", step=1, idle_seconds=idle))
    return progress.advance(before, report, NOW + timedelta(seconds=after))


def test_how_long_ago_needs_no_common_clock() -> None:
    body = heard(90, 0)
    assert body["lastAdvanceTime"] == "2026-03-01T11:58:30.000Z"
    assert progress.idle_seconds(heard(120, 30, body)) == pytest.approx(120, abs=0.01)
    assert heard(1e300, 60, body)["lastAdvanceTime"] == body["lastAdvanceTime"]  # never back


@given(
    st.dictionaries(st.integers(0, 200), st.text(min_size=1, max_size=9)),
    st.dictionaries(st.integers(0, 200), st.text(min_size=1, max_size=9)),
)
def test_places_of_two_replicas_are_merged(theirs: dict[int, str], ours: dict[int, str]) -> None:
    body = progress.with_stacks({"step": 1, "stacks": "old"}, theirs, ours)
    found = progress.stacks_of(body)
    assert len(found) == min(MAX_STACKS, len({**theirs, **ours}))
    assert found.items() <= {**theirs, **ours}.items()
    assert progress.with_stacks(body, found) == body
    assert body["step"] == 1
