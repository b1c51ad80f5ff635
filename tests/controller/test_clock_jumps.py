"""Times that were written by a clock that has been set back since: nobody waits for the clock to catch up with them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_statusserver_writer import FAST, KEY, OneJob, made, training, until

from posttrain_operator import clock
from posttrain_operator.reconcile import pauses
from posttrain_operator.statusserver.progress import rfc3339

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@given(paused=st.floats(1, 600), drawn=st.floats(0.5, 1.5), passed=st.floats(0, 1000))
def test_a_pause_is_kept_to_its_end(paused: float, drawn: float, passed: float) -> None:
    status = {"restarts": pauses._written(paused, paused * drawn, NOW)}
    rest = pauses.remaining(status, NOW + timedelta(seconds=passed))
    end = clock.parse(status["restarts"]["notBefore"])
    assert end is not None
    assert rest == pytest.approx(max(0.0, (end - NOW).total_seconds() - passed), abs=2e-6)  # microseconds


@given(back=st.floats(3600, 1e7))
def test_a_pause_of_a_clock_that_was_set_back_is_over(back: float) -> None:
    status = {"restarts": pauses._written(300, 450, NOW)}
    assert pauses.remaining(status, NOW - timedelta(seconds=back)) == 0


@pytest.mark.parametrize("ahead", [3600.0, 30 * 86400.0])
async def test_progress_of_the_future_does_not_silence_a_job(ahead: float) -> None:
    """The last report was written by a clock that was ahead; reports of now are written, in their usual rhythm."""
    job = OneJob()
    future = rfc3339(datetime.now(UTC) + timedelta(seconds=ahead))
    job.change(progress={"step": 1, "percent": 1, "phase": "Training", "lastUpdateTime": future})
    writer = made(job, FAST)
    writer.accept(KEY, training(2))
    await until(lambda: len(job.writes) == 1, 10)
    assert job.writes[0]["step"] == 2
    assert job.writes[0]["lastUpdateTime"] < future
    writer.accept(KEY, training(3))
    await until(lambda: len(job.writes) == 2, 10)
