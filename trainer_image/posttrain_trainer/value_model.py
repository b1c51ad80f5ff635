"""PPO's critic as a model: V of the state before each counted token, by a head of one number on the hidden states.

Made by critic_model.py and run by an engine. Two forms: a model of its own, or a second adapter and a head on the
policy's frozen base (plan A). The branch of the shared one is chosen by a scope that touches nothing but which adapter
answers: with peft's own switches DeepSpeed would drop gradients silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from posttrain_trainer.lora import POLICY, adapter_scope
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.score_model import ScoreHead
from posttrain_trainer.scorer import Scorer, causal_lm

CRITIC = "value"
"""The critic's adapter and its role on a shared base; the policy's is lora.POLICY."""


class ValueModel(nn.Module):
    """Tokens in, one value per counted position out. The engine must be called, never this module: ZeRO-3 counts
    forwards there. lm: the body of a model, alone or below an adapter; the head learns beside it."""

    def __init__(self, lm: nn.Module, head: ScoreHead) -> None:
        super().__init__()
        self.lm = lm
        self.head = head

    @staticmethod
    def inputs(micro: MicroBatch) -> tuple[Tensor | None, ...]:
        """What `forward` takes of a micro-batch."""
        return micro.input_ids, micro.positions, micro.index

    def forward(self, input_ids: Tensor, positions: Tensor | None, index: Tensor) -> Tensor:
        """input_ids [b, T], positions [b, T] of packed sequences, index [n] into the flattened b·T → values [n] fp32 of
        the state that each position's token completes, from which the next one is predicted."""
        return _values(self.lm, self.head, (input_ids, positions, index))


class SharedModel(Scorer):
    """Policy and critic on one frozen base: adapters `default` and `value`, and the critic's head. At rest it is the
    policy."""

    def __init__(self, lm: nn.Module, head: ScoreHead, temperature: float = 1.0) -> None:
        super().__init__(lm, temperature)
        self.head = head
        self.role = POLICY

    def inputs(self, micro: MicroBatch) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # needs the branch
        """What `forward` takes of a micro-batch: without targets it gives values."""
        return micro.input_ids, micro.positions, micro.index, None if self.role == CRITIC else micro.targets

    def forward(self, input_ids: Tensor, positions: Tensor | None, index: Tensor, targets: Tensor | None = None) -> Any:
        """As Scorer.forward; without targets as ValueModel.forward."""
        if targets is None:
            return _values(self.lm, self.head, (input_ids, positions, index))
        return super().forward(input_ids, positions, index, targets)

    @contextmanager
    def scope(self, role: str) -> Iterator[None]:
        """Inside it the model is this role's: for its forward and its backward."""
        before, self.role = self.role, role
        try:
            with adapter_scope(self.lm, role):
                yield
        finally:
            self.role = before

    def by_role(self) -> dict[str, list[nn.Parameter]]:
        """Who learns what. The head of the language model is the policy's, should it have an adapter."""
        found: dict[str, list[nn.Parameter]] = {POLICY: [], CRITIC: []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                critics = name.startswith("head.") or f".{CRITIC}." in name
                found[CRITIC if critics else POLICY].append(parameter)
        return found


def _values(lm: nn.Module, head: nn.Module, given: tuple[Tensor, Tensor | None, Tensor]) -> Tensor:
    """No mask and no cache, as in the scorer."""
    input_ids, positions, index = given
    body = causal_lm(lm).base_model
    hidden = body(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state
    values: Tensor = head(hidden.flatten(0, 1)[index])
    return values[:, 0]
