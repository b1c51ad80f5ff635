"""Every reward once, before any rank starts: a syntax error, a wrong column or a server that is down costs seconds, not
the first rollout.

Called by `prepare` with a few rows. Models are not run here. The completions are made up: the row's own answer where
one of the rewards says which column holds it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from posttrain_api.online import RewardConfig
from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.rewards.base import Completion
from posttrain_trainer.rewards.reward_set import RewardSet

log = logging.getLogger(__name__)

_MADE_UP = "The answer is 42."


@dataclass(frozen=True)
class Trial:
    """What a reward gave to made-up completions. mean: of those that it scored; scored, rows: how many of them."""

    name: str
    mean: float
    scored: int
    rows: int
    seconds: float


def dry_run(configs: Sequence[RewardConfig], rows: Sequence[Completion]) -> tuple[Trial, ...]:
    """Scores these rows (a few of each source; an empty text is made up) with every reward but the models.

    TrainerFailure(RewardError) where one cannot be loaded, where it fails and its onError is Fail, and where no row has
    an answer that it can read.
    """
    ours = [config for config in configs if config.model is None]
    if not ours or not rows:
        return ()
    rewards = RewardSet(ours, lambda verdict: [verdict])
    try:
        scored = rewards.score([made_up(row, ours) for row in rows])
    finally:
        rewards.close()
    trials = []
    for config, values in zip(ours, scored.values.T, strict=True):
        known = values[~np.isnan(values)]
        _check_column(config, rows, len(known))
        mean = float(known.mean()) if len(known) else float("nan")
        trials.append(Trial(config.name, mean, len(known), len(rows), scored.seconds[config.name]))
        log.info("reward %s: tried on %d rows, scored %d, mean %.3g", config.name, len(rows), len(known), mean)
    return tuple(trials)


def made_up(row: Completion, configs: Sequence[RewardConfig]) -> Completion:
    """With the row's answer as text, or a sentence; a text that is there stays."""
    if row.text:
        return row
    columns = [setting.column for config in configs for setting in (config.math, config.exact_match) if setting]
    answers = [row.columns[column] for column in columns if row.columns.get(column) is not None]
    return replace(row, text=str(answers[0]) if answers else _MADE_UP)


def _check_column(config: RewardConfig, rows: Sequence[Completion], scored: int) -> None:
    setting = config.math or config.exact_match
    if setting is None or scored:
        return
    names = sorted({name for row in rows for name in row.columns})
    examples = [row.columns[setting.column] for row in rows if row.columns.get(setting.column) is not None]
    found = f"its first is {str(examples[0])[:80]!r}" if examples else "no row has it"
    raise TrainerFailure(
        Reason.REWARD_ERROR,
        f"reward {config.name!r}: none of {len(rows)} rows has an answer in the column {setting.column!r} that can be "
        f"read ({found}); columns beside the prompt: {', '.join(names) or 'none'}. Name the column that holds it.",
    )
