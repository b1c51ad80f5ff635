"""Jumps of the wall clock: one that passes is never seen, one that lasts is believed, slow drift is followed."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from posttrain_operator.clock import SteadyClock

T0 = 1_800_000_000.0
PATIENCE, TOLERANCE = 60.0, 2.0


class Machine:
    """A wall clock that can be set, and a monotonic one that cannot."""

    def __init__(self) -> None:
        self.tick, self.set_by = 1000.0, 0.0
        self.clock = SteadyClock(self.wall, lambda: self.tick, TOLERANCE, PATIENCE)

    def wall(self) -> float:
        return T0 + (self.tick - 1000.0) + self.set_by

    def after(self, seconds: float) -> float:
        """Lets time pass and returns what the clock says, in seconds after T0."""
        self.tick += seconds
        return (self.clock() - datetime.fromtimestamp(T0, UTC)).total_seconds()


def test_without_jumps_it_is_the_wall_clock() -> None:
    machine = Machine()
    assert [round(machine.after(10), 3) for _ in range(3)] == [10, 20, 30]


@given(jump=st.floats(-1e6, 1e6).filter(lambda jump: abs(jump) > TOLERANCE), looks=st.lists(st.floats(0.1, 5)))
def test_a_jump_that_passes_is_never_seen(jump: float, looks: list[float]) -> None:
    machine = Machine()
    machine.set_by = jump
    passed = 0.0
    for look in looks:
        if passed + look >= PATIENCE:
            break
        passed += look
        assert abs(machine.after(look) - passed) < 0.01
    machine.set_by = 0.0
    assert abs(machine.after(1.0) - passed - 1.0) < 0.01


@given(jump=st.floats(-1e6, 1e6).filter(lambda jump: abs(jump) > TOLERANCE))
def test_a_jump_that_lasts_is_believed(jump: float) -> None:
    """A clock that was set right, or a machine that slept."""
    machine = Machine()
    machine.set_by = jump
    assert abs(machine.after(1.0) - 1.0) < 0.01
    assert abs(machine.after(PATIENCE) - 61.0 - jump) < 0.01


def test_a_clock_that_jumps_about_is_never_believed() -> None:
    machine = Machine()
    for number in range(100):
        machine.set_by = 3600.0 * (number % 3 + 1)
        machine.after(1.0)
    assert abs(machine.after(0.0) - 100.0) < 0.01


@given(drift=st.floats(-0.01, 0.01), steps=st.integers(1, 200))
def test_slow_drift_is_followed(drift: float, steps: int) -> None:
    machine = Machine()
    for _ in range(steps):
        machine.set_by += 10 * drift
        told = machine.after(10.0)
    assert abs(told - (machine.wall() - T0)) < 0.01
