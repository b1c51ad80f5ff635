"""What completions.jsonl shows of a rollout: whole groups from the first on, and no NaN, which JSON has not."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np

from posttrain_trainer.drawing import Drawn
from posttrain_trainer.experience import Experience
from posttrain_trainer.online import SHOWN, Collector


def _lines(rewards: list[list[float]]) -> list[dict[str, Any]]:
    count = len(rewards)
    experience = Experience(
        prompts=(np.array([5], np.int32),) * count,
        completions=tuple(np.array([7, 8][: 1 + number % 2], np.int32) for number in range(count)),
        ended=np.arange(count) % 2 == 0,
        group=np.arange(count) // 2,
        rewards=np.array(rewards),
        weights=(1.0, 0.5),
    )
    drawer: Any = SimpleNamespace(
        rewards=SimpleNamespace(names=("right", "short")), decode=lambda ids: str(ids.tolist())
    )
    collector = Collector(SimpleNamespace(drawer=drawer), *[None] * 4)  # type: ignore[arg-type]
    advantage = experience.spread(np.arange(count, dtype=np.float32))
    return collector._lines(Drawn(experience, np.arange(count) + 100, {}, {}), advantage)


def test_a_line_has_what_the_documents_say() -> None:
    lines = _lines([[1.0, 1.0], [0.0, 1.0]])
    assert lines[1] == {
        "prompt": "[5]",
        "completion": "[7, 8]",
        "reward": 0.5,
        "rewards": {"right": 0.0, "short": 1.0},
        "advantage": 1.0,
        "ended": False,
        "row": 101,
    }


def test_skipped_rewards_are_null() -> None:
    lines = _lines([[np.nan, 1.0], [np.nan, np.nan]])
    assert [line["reward"] for line in lines] == [0.5, None]
    assert lines[1]["rewards"] == {"right": None, "short": None}
    json.dumps(lines, allow_nan=False)


def test_only_the_first_are_shown() -> None:
    assert len(_lines([[1.0, 0.0]] * (SHOWN + 4))) == SHOWN
