"""A reward that is a model: the scores of a frozen reward model for prompt and completion as they were sampled.

Made by assemble, run by all ranks together, because at ZeRO-3 each of them holds a part of the weights. The tokens go
in as they are: a way through text could cut them differently, so the reward model must have the policy's vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from posttrain_api.reasons import Reason
from posttrain_trainer.batching import Share, cut
from posttrain_trainer.engine import FrozenEngine
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.loading import ModelFolder, load_scores
from posttrain_trainer.microbatch import MicroBatch, collate, dummy
from posttrain_trainer.rewards.base import Completion
from posttrain_trainer.rewards.calls import Reply
from posttrain_trainer.rewards.workers import Outcome
from posttrain_trainer.runtime import Control
from posttrain_trainer.score_model import ScoreModel
from posttrain_trainer.signs import mark
from posttrain_trainer.tokenset import Example, TrainingRow


def reward_module(name: str, folder: ModelFolder, tokenizer: Path) -> ScoreModel:
    """What the engine of the reward `name` runs, in fp32 on the CPU. `tokenizer`: the policy's.
    TrainerFailure(ModelIncompatible) where the folder holds no reward model of the same vocabulary."""
    model = load_scores(folder)
    check_vocabulary(name, folder.path, tokenizer, len(model.get_input_embeddings().weight))
    return ScoreModel(model)


def check_vocabulary(name: str, folder: Path, tokenizer: Path, rows: int) -> None:
    """The same tokens under the same numbers. `rows`: of the reward model's embedding."""
    theirs, ours = (_vocabulary(each) for each in (folder, tokenizer))
    different = sorted(token for token, number in ours.items() if theirs.get(token) != number)
    largest = max(ours.values())
    if not different and largest < rows:
        return
    found = (
        f"{len(different)} of the policy's {len(ours)} tokens are others there, {different[0]!r} for example"
        if different
        else f"its embedding has {rows} rows, the policy's largest token number is {largest}"
    )
    raise TrainerFailure(
        Reason.MODEL_INCOMPATIBLE,
        f"reward {name!r}: the reward model has another vocabulary than the policy: {found}. It is given the policy's "
        "tokens as they are: train one from a model of the same family, or serve this one behind an http reward.",
    )


def _vocabulary(folder: Path) -> Mapping[str, int]:
    try:
        found: Mapping[str, int] = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    except (OSError, ValueError) as error:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{folder}: its tokenizer cannot be loaded: {error}. A reward model needs its tokenizer beside it.",
        ) from error
    return found


@dataclass(frozen=True)
class RewardModel:
    """A frozen reward model on all ranks. part: this rank's, with the token budget of a micro-batch and whether its
    lines are packed; it is asked for whole sequences."""

    engine: FrozenEngine
    control: Control
    part: Share
    device: torch.device

    def score(self, completions: Sequence[Completion]) -> Outcome:
        """One score per completion; not finite: an error of its row. All ranks call it together, also without a
        completion, and run equally many forwards."""
        begun = time.monotonic()
        rows = [_row(completion) for completion in completions]
        lengths = np.array([len(row.examples[0].tokens) for row in rows], dtype=np.int64).reshape(-1, 1)
        micros = cut(range(len(rows)), lengths, self.part) if rows else []
        values = np.zeros(len(rows))
        for number in range(int(self.control.max([len(micros)])[0])):
            chosen = micros[number] if number < len(micros) else []
            scores = self.engine.forward(self._micro([rows[row] for row in chosen]).to(self.device))
            values[chosen] = scores[: len(chosen)].double().cpu().numpy()
            mark()
        return Outcome(_reply(values), time.monotonic() - begun)

    def close(self) -> None:
        """Gives its memory back."""
        self.engine.close()

    def _micro(self, rows: Sequence[TrainingRow]) -> MicroBatch:
        packed = self.part.packed
        return collate(rows, True, packed) if rows else dummy(_DUMMY, True, packed)


_DUMMY = TrainingRow((Example(np.zeros(2, dtype=np.int32), np.zeros(2, dtype=np.uint8)),), {})


def _row(completion: Completion) -> TrainingRow:
    tokens = np.concatenate([completion.prompt_tokens, completion.tokens])
    return TrainingRow((Example(tokens, np.zeros(len(tokens), dtype=np.uint8)),), {})


def _reply(values: Any) -> Reply:
    wrong = {place: f"it scored {value}" for place, value in enumerate(values) if not math.isfinite(value)}
    return Reply([None if place in wrong else float(value) for place, value in enumerate(values)], wrong)
