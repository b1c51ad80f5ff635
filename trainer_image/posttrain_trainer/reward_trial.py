"""Rows of the prompt sets on which every reward is tried once, before any rank starts.

Called by `prepare`, once the sets are there. The tokens of a made-up completion are nobody's: only rewards that count
them look at them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from posttrain_api.online import RewardConfig
from posttrain_trainer.prompts import PromptSet
from posttrain_trainer.rewards.base import Completion
from posttrain_trainer.rewards.dry_run import dry_run

ROWS = 8
"""Of each source, from its whole length: one row may be odd."""


def try_rewards(configs: Sequence[RewardConfig], sets: Sequence[PromptSet], tokenizer: Any) -> list[str]:
    """A line per reward that was tried. TrainerFailure(RewardError) with the reward's name where one cannot work."""
    rows = [completion for prompts in sets for completion in _completions(prompts, tokenizer)]
    return [
        f"reward {trial.name}: tried on {trial.rows} rows with made-up completions, scored {trial.scored}, "
        f"mean {trial.mean:.3g}, {trial.seconds:.2f} s"
        for trial in dry_run(configs, rows)
    ]


def _completions(prompts: PromptSet, tokenizer: Any) -> Iterator[Completion]:
    for row in _rows(prompts.sources):
        tokens = prompts.prompt(row)
        yield Completion(
            prompt=tokenizer.decode(tokens.tolist(), skip_special_tokens=True),
            text="",
            prompt_tokens=tokens,
            tokens=np.array([tokenizer.eos_token_id], dtype=np.int32),
            ended=True,
            columns=prompts.columns(row),
            number=row,
        )


def _rows(sources: Sequence[int]) -> Iterator[int]:
    first = 0
    for count in sources:
        yield from sorted({first + int(place) for place in np.linspace(0, count - 1, min(ROWS, count))})
        first += count
