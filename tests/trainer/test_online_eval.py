"""The evaluation of stage RL: every held-out prompt once, and what is said of all blocks together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from posttrain_trainer.drawing import Drawn, Order
from posttrain_trainer.experience import ROLLOUT, Experience
from posttrain_trainer.online_eval import OnlineEvaluator


def _drawn(order: Order) -> Drawn:
    count = len(order.rows)
    experience = Experience(
        prompts=(np.array([5], np.int32),) * count,
        completions=(np.array([7], np.int32),) * count,
        ended=np.ones(count, dtype=bool),
        group=np.arange(count),
        rewards=order.rows[:, None].astype(float),
        each={ROLLOUT: np.zeros(count, dtype=np.float32)},
    )
    return Drawn(experience, order.rows, seconds={"right": 0.5}, failures={"right": count})


def test_blocks_are_put_together() -> None:
    orders: list[Order] = []

    def draw(order: Order, stopping: Any, phases: Any) -> Drawn:
        orders.append(order)
        return _drawn(order)

    drawer: Any = SimpleNamespace(prompts=range(5), rewards=SimpleNamespace(names=("right",)), draw=draw)
    metrics = OnlineEvaluator(drawer, block=2).run(None, lambda: False)  # type: ignore[arg-type]
    assert [order.rows.tolist() for order in orders] == [[0, 1], [2, 3], [4]]
    assert metrics is not None
    assert metrics["eval_reward"] == 2.0
    assert metrics["eval_rewards/right/failures"] == 5.0
    assert metrics["eval_rewards/right/seconds"] == 1.5
