"""The scorer: the module that the engine runs, a causal language model that answers with scores, not with logits.

Made by assemble around the policy before DeepSpeed sees it. Its forward runs the model's body and gives the counted
positions to the head, whose forward returns their log-probabilities. It must never hold the logits of a whole batch,
and never call the head's weight outside the head's own forward: ZeRO-3 gathers it there.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.head import LogitTransform, fused_scores, scores_by_rows
from posttrain_trainer.losses import Scores
from posttrain_trainer.microbatch import MicroBatch


class Scorer(nn.Module):
    """Tokens in, scores of counted positions out. The engine must be called, never this module: ZeRO-3 counts
    forwards there."""

    def __init__(self, lm: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.lm = lm
        patch_head(causal_lm(lm), temperature)

    @staticmethod
    def inputs(micro: MicroBatch) -> tuple[Tensor | None, ...]:
        """What `forward` takes of a micro-batch."""
        return micro.input_ids, micro.positions, micro.index, micro.targets

    def forward(self, input_ids: Tensor, positions: Tensor | None, index: Tensor, targets: Tensor) -> Scores:
        """input_ids [b, T], positions [b, T] of packed sequences, index [n] into the flattened b·T, targets [n]
        → log p, entropy, correct, each [n] fp32.

        No mask: rows are padded on the right. `use_cache` is off in evaluation too: it would change the positions'
        meaning.
        """
        inner = causal_lm(self.lm)
        hidden = inner.base_model(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state
        scores: Scores = inner.get_output_embeddings()(hidden.flatten(0, 1)[index], targets)
        return scores


def causal_lm(model: nn.Module) -> Any:
    """The transformers model itself, below peft where there is an adapter."""
    below: Any = getattr(model, "get_base_model", None)
    return model if below is None else below()


def patch_head(lm: Any, temperature: float = 1.0) -> None:
    """Lets `lm_head(hidden, targets)` return scores; `lm_head(hidden)` stays as it was.

    On the instance and before the engine is made, so that ZeRO-3's hooks gather the weight around the new forward. A
    head that is no plain linear layer (one with an adapter, one that normalises its weight) is asked for rows of
    logits: nothing is known of what it does.
    """
    head = lm.get_output_embeddings()
    project, transform = head.forward, logit_transform(lm.config, temperature)
    plain, vocabulary = type(head).forward is nn.Linear.forward, len(head.weight)

    def forward(module: Any, hidden: Tensor, targets: Tensor | None = None) -> Tensor | Scores:
        if targets is None:
            logits: Tensor = project(hidden)
            return logits
        if plain:
            return fused_scores(hidden, module.weight, module.bias, targets, transform)
        return scores_by_rows(lambda rows: transform(project(rows)), hidden, targets, vocabulary)

    head.forward = types.MethodType(forward, head)


def logit_transform(config: Any, temperature: float = 1.0) -> LogitTransform:
    """What some families do to logits after the head: Cohere multiplies, Granite divides, Gemma caps by tanh."""
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return LogitTransform(scale, getattr(config, "final_logit_softcapping", None), temperature)


@torch.no_grad()
def check_head(model: Any) -> None:
    """A few tokens through the whole model and through body and head apart must give the same logits.

    A family that does something else between its body and its logits is refused here instead of being trained wrong.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]), device=device)[None]
    was_training = model.training
    model.eval()
    whole = model(input_ids=ids, use_cache=False).logits
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    apart = logit_transform(model.config)(model.get_output_embeddings()(hidden))
    model.train(was_training)
    if not torch.allclose(whole, apart, rtol=1e-4, atol=1e-4):
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{type(model).__name__}: its logits are not its output embedding applied to the last hidden state "
            f"(difference {float((whole - apart).abs().max()):.2g}), which this trainer builds on. "
            "Use another model family.",
        )
