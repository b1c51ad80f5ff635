"""A rollout engine with a script instead of a model, for the tests of everything that needs completions.

No model draws here, so its log-probabilities are whatever the script says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from posttrain_trainer.rollout.base import Request, Sample, Sampling, Stopping
from posttrain_trainer.rollout.checks import finished
from posttrain_trainer.rollout.turns import Stopped, Turns
from posttrain_trainer.runtime import Control

Script = Callable[[Request], Sequence[int]]
"""The tokens of a request's completion, at least one."""


class Scripted:
    """See rollout/base.py. Cuts completions as a real engine does: after the first stop token, and at max_new_tokens.
    `logprob`: of every token."""

    def __init__(self, script: Script, control: Control, logprob: float = -1.0) -> None:
        self._script = script
        self._control = control
        self._logprob = logprob
        self.calls: list[list[Request]] = []

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, version: int, stopping: Stopping
    ) -> list[Sample] | None:
        """As Rollout.generate; keeps what it was asked in `calls`."""
        self.calls.append(list(requests))
        try:
            Turns(self._control, stopping).finish()
        except Stopped:
            return None
        cut = [_cut(self._script(request), sampling) for request in requests]
        return [finished(tokens, [self._logprob] * len(tokens), sampling, version) for tokens in cut]


def _cut(tokens: Sequence[int], sampling: Sampling) -> list[int]:
    kept = list(tokens)[: sampling.max_new_tokens]
    ends = [place for place, token in enumerate(kept) if token in sampling.stops]
    return kept[: ends[0] + 1] if ends else kept
