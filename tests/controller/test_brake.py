"""The global brake: how long everybody rests, what makes it gentle again, and who asked for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_operator.brake import Brake
from posttrain_operator.cluster.errors import is_outage


class Time:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def brake_on(time: Time, chance: float = 0.5) -> Brake:
    return Brake(first=0.5, limit=30.0, clock=time, chance=lambda: chance)


def failed(brake: Brake, time: Time, times: int) -> list[float]:
    """So many failures, each after the rest of the last."""
    rests = []
    for _ in range(times):
        rests.append(brake.pull(None))
        time.now += brake.rest
    return rests


def test_the_rest_doubles_up_to_its_limit_and_never_ends_growing_tired() -> None:
    time = Time()
    rests = failed(brake_on(time), time, 200)
    assert rests[:8] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert set(rests[8:]) == {30}


@given(chance=st.floats(0, 1), asked=st.floats(0.1, 200))
def test_a_wish_of_the_server_is_never_cut_short(chance: float, asked: float) -> None:
    brake = brake_on(Time(), chance)
    assert asked <= brake.pull(asked) <= asked * 1.25
    assert brake.rest >= asked * 0.999


def test_a_wish_for_a_day_is_a_mistake() -> None:
    assert brake_on(Time(), 0.0).pull(86400.0) == 300


def test_a_server_that_wants_no_rest_is_rested_from_all_the_same() -> None:
    time = Time()
    brake = brake_on(time)
    rests = [brake.pull(0.0)]
    time.now += brake.rest
    assert [*rests, brake.pull(0.0)] == [0.5, 1]


def test_requests_that_fail_together_count_once() -> None:
    time = Time()
    brake = brake_on(time)
    for _ in range(16):
        brake.pull(None)
    time.now += brake.rest
    assert brake.pull(None) == 1


def test_a_shorter_rest_does_not_end_a_longer_one() -> None:
    brake = brake_on(Time())
    brake.pull(20.0)
    brake.pull(None)
    assert brake.rest >= 20


@pytest.mark.parametrize(("code", "next_rest"), [(200, 0.5), (409, 0.5), (404, 0.5), (503, 8), (429, 8), (0, 8)])
def test_an_answer_of_any_kind_ends_the_back_off_and_an_outage_does_not(code: int, next_rest: float) -> None:
    time = Time()
    brake = brake_on(time)
    failed(brake, time, 4)
    brake.heard("GET", code, 0.1)
    assert brake.pull(None) == next_rest
    assert is_outage(code) == (code in (429, 503))


async def test_waiting_ends_with_the_rest() -> None:
    brake = Brake(first=0.01, limit=0.02)
    brake.pull(None)
    assert brake.rest > 0
    await brake.wait()
    assert brake.rest == 0
