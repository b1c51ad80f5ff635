"""The reward model: a language model's body with a head of one number, a sequence's score.

Made by model.py around transformers' own sequence classifier, so that the export loads anywhere; run by the engine.
The score is read at a sequence's last real token, which its length tells. transformers, which knows no lengths, reads
at the last token that is not the pad token: `pad_token` finds one that never ends a sequence. This module must never
ask what a token is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.scorer import causal_lm

HEAD = "score"
"""transformers' name of the head in its decoder-only sequence classifiers."""


class ScoreHead(nn.Linear):
    """h [n, H] → w·h [n, 1], always computed in fp32: a difference of two scores of 8 bits is mostly rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """input [n, H] of any type → fp32."""
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


class ScoreModel(nn.Module):
    """Tokens in, one score per sequence out. The engine must be called, never this module: ZeRO-3 counts forwards
    there."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm

    @staticmethod
    def inputs(micro: MicroBatch) -> tuple[Tensor | None, ...]:
        """What `forward` takes of a micro-batch."""
        return micro.input_ids, micro.positions, micro.ends

    def forward(self, input_ids: Tensor, positions: Tensor | None, ends: Tensor) -> Tensor:
        """input_ids [b, T] with each sequence's last token, positions [b, T] of packed sequences, ends [s] into the
        flattened b·T → scores [s] fp32. No mask and no cache, as in the scorer."""
        inner = causal_lm(self.lm)
        hidden = inner.base_model(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state
        scores: Tensor = getattr(inner, HEAD)(hidden.flatten(0, 1)[ends])
        return scores[:, 0]


def set_head(model: Any, seed: int, *, draw: bool) -> None:
    """Puts a ScoreHead in the place of the model's own: with its weights, or with new ones from N(0, 1/(H + 1)), drawn
    from `seed` alike on every rank. TrainerFailure where there is no such head.

    Stiennon et al. 2020, appendix B: on normalized hidden states scores then begin with variance 1 at every width,
    where transformers' fixed 0.02 begins at 0.3 with 256 channels and at 1.8 with 8192.
    """
    old = getattr(model, HEAD, None)
    if not isinstance(old, nn.Linear) or old.out_features != 1:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{type(model).__name__}: its head is no linear layer called {HEAD!r} with one output, which a reward "
            "model is made of. Use another model family.",
        )
    head = ScoreHead(old.in_features, 1, bias=old.bias is not None)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head.load_state_dict(old.state_dict())
        if draw:
            head.weight.normal_(std=(old.in_features + 1) ** -0.5)
            _ = head.bias is not None and head.bias.zero_()
    setattr(model, HEAD, head)


@torch.no_grad()
def check_scores(model: Any) -> None:
    """The whole model and body and head apart must give the same score; a family that does something else between
    them is refused here instead of being trained wrong."""
    embeddings = model.get_input_embeddings().weight
    ids = torch.arange(min(8, embeddings.shape[0]), device=embeddings.device)[None]
    was_training = model.training
    model.eval()
    text = model.config.get_text_config()
    pad = text.pad_token_id
    text.pad_token_id = None  # then transformers reads at the last token of a batch of one
    whole = model(input_ids=ids, use_cache=False).logits
    text.pad_token_id = pad
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    apart = getattr(model, HEAD)(hidden[:, -1])
    model.train(was_training)
    if not torch.allclose(whole, apart, rtol=1e-4, atol=1e-4):
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{type(model).__name__}: its score is not its head applied to the last hidden state (difference "
            f"{float((whole - apart).abs().max()):.2g}), which this trainer builds on. Use another model family.",
        )


def pad_token(tokenizer: Any, vocabulary: int, where: str) -> str:
    """The token that a reward model's batches are padded with: the tokenizer's own unless it is EOS, else a special
    token that no template writes. TrainerFailure where there is none.

    With pad = EOS transformers would skip the EOS that ends a sequence and read the score one token before it.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        own: str = tokenizer.pad_token
        return own
    template = tokenizer.chat_template or ""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    free = [
        token
        for token in sorted(special | set(tokenizer.all_special_tokens))
        if token != tokenizer.eos_token
        and token not in str(template)
        and tokenizer.convert_tokens_to_ids(token) < vocabulary
    ]
    if not free:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{where}: its tokenizer pads with EOS and has no other special token. A reward model needs a pad token "
            "that never ends a sequence: add one to the tokenizer.",
        )
    return min(free, key=lambda token: (_rank(token, {tokenizer.bos_token}), token))


def _rank(token: str, begins: Collection[str | None]) -> int:
    """Names that say padding first, tokens kept for such uses next; the one that begins sequences last."""
    if token in begins:
        return 3
    return 0 if "pad" in token.lower() else 1 if "reserved" in token.lower() else 2
