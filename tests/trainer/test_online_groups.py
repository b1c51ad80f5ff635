"""Dynamic sampling: which prompts a step draws, what it keeps, and where the next step begins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from posttrain_trainer.drawing import Drawn, Order
from posttrain_trainer.experience import ROLLOUT, Experience
from posttrain_trainer.groups import Groups, varied
from posttrain_trainer.metrics import Phases
from posttrain_trainer.sampler import Sampler
from posttrain_trainer.steps import Visit

SAMPLER = Sampler(size=12, batch_size=4, total=10, seed=3)


class Dice:
    """Two samples for each prompt; the group at a place teaches something where `teaching` has the place."""

    def __init__(self, teaching: set[int]) -> None:
        self.orders: list[Order] = []
        self.teaching = teaching

    def draw(self, order: Order, stopping: Any, phases: Any) -> Drawn | None:
        self.orders.append(order)
        if stopping():
            return None
        places = np.repeat(order.places, order.group_size)
        first = np.arange(len(places)) % order.group_size == 0
        rewards = np.where(first & np.isin(places, list(self.teaching)), 1.0, 0.0)
        experience = Experience(
            prompts=tuple(np.array([place], np.int32) for place in places),
            completions=(np.array([7, 1], np.int32),) * len(places),
            ended=np.ones(len(places), dtype=bool),
            group=np.arange(len(places)) // order.group_size,
            rewards=rewards[:, None],
            each={ROLLOUT: np.repeat(places, 2).astype(np.float32)},
        )
        return Drawn(experience, np.repeat(order.rows, order.group_size), {"right": 1.0}, {"right": 2})


def _draw(dice: Dice, step: int, cursor: int, refills: int, stop: bool = False) -> tuple[Drawn, int] | None:
    drawer: Any = SimpleNamespace(draw=dice.draw)
    visit = Visit(step, None, Phases(), lambda: stop)
    return Groups(drawer, SAMPLER, group_size=2, max_refills=refills).draw(visit, cursor)


def _places(drawn: Drawn) -> list[int]:
    return [int(prompt[0]) for prompt in drawn.experience.prompts[::2]]


def test_groups_without_variance_are_replaced() -> None:
    dice = Dice({1, 2, 5, 7, 9})
    found = _draw(dice, step=0, cursor=0, refills=3)
    assert found is not None
    drawn, cursor = found
    assert [order.places.tolist() for order in dice.orders] == [[0, 1, 2, 3], [4, 5], [6], [7]]
    assert _places(drawn) == [1, 2, 5, 7]
    assert cursor == 8
    assert drawn.experience.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert drawn.experience.each[ROLLOUT].tolist() == [1] * 4 + [2] * 4 + [5] * 4 + [7] * 4
    assert drawn.rows.tolist() == np.repeat(SAMPLER.at(np.array([1, 2, 5, 7])), 2).tolist()
    assert (drawn.seconds, drawn.failures) == ({"right": 4.0}, {"right": 8})


def test_refills_end() -> None:
    """What was found is trained on, though it is less than a step's."""
    dice = Dice({2})
    found = _draw(dice, step=0, cursor=0, refills=2)
    assert found is not None
    assert _places(found[0]) == [2]
    assert found[1] == 4 + 3 + 3


def test_where_nothing_teaches_the_last_draw_stays() -> None:
    """The step is made, its metrics show it, its gradient is 0."""
    found = _draw(Dice(set()), step=0, cursor=0, refills=1)
    assert found is not None
    assert _places(found[0]) == [4, 5, 6, 7]
    assert len(varied(found[0].experience)) == 0


def test_without_refills_everything_stays() -> None:
    found = _draw(Dice(set()), step=1, cursor=4, refills=0)
    assert found is not None
    assert _places(found[0]) == [4, 5, 6, 7]
    assert found[1] == 8


def test_the_last_step_may_be_smaller_and_the_order_does_not_end() -> None:
    """10 prompts of training in steps of 4: the third has two. Its places lie where earlier refills left them."""
    dice = Dice({13, 14})
    found = _draw(dice, step=2, cursor=12, refills=1)
    assert found is not None
    assert [len(order.places) for order in dice.orders] == [2, 1]
    assert _places(found[0]) == [13, 14]


@pytest.mark.parametrize("refills", [0, 2])
def test_stopped_in_a_rollout(refills: int) -> None:
    assert _draw(Dice({0}), step=0, cursor=0, refills=refills, stop=True) is None
