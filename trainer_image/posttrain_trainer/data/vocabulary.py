"""A tokenizer as the data code sees it: ids, the end-of-sequence token, the chat template and the token that ends an
answer.

Everything the tokenizer decides is asked here once and linted: no EOS, or a template that never ends an answer, and
no row could teach the model to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posttrain_api.reasons import Reason
from posttrain_trainer.data.messages import Message, RowRefused
from posttrain_trainer.errors import TrainerFailure

_PROBE = ({"role": "user", "content": "Question 1"}, {"role": "assistant", "content": "Answer 2"})


class Vocabulary:
    """Wraps a transformers tokenizer. ModelIncompatible at construction where it has no EOS token."""

    def __init__(self, tokenizer: Any, where: str) -> None:
        if tokenizer.eos_token_id is None:
            raise TrainerFailure(
                Reason.MODEL_INCOMPATIBLE,
                f"{where}: the tokenizer has no EOS token, so no answer could end. "
                "Set eos_token in its tokenizer_config.json to a token of its vocabulary.",
            )
        self._tokenizer = tokenizer
        self._where = where
        self.eos: int = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id
        self.stop = self.eos

    def __len__(self) -> int:
        return len(self._tokenizer)

    def require_chat(self) -> None:
        """Finds the stop token of the chat template. ModelIncompatible where there is no template or it has none."""
        if not self._tokenizer.chat_template:
            raise TrainerFailure(
                Reason.MODEL_INCOMPATIBLE,
                f"{self._where}: the rows are messages, but the tokenizer has no chat template. Set "
                "model.chatTemplate.",
            )
        stop = self._template_stop()
        if stop is None:
            raise TrainerFailure(
                Reason.MODEL_INCOMPATIBLE,
                f"{self._where}: the chat template ends an answer with no special token, so the model could not "
                "learn to "
                "stop. Set model.chatTemplate to one that writes eos_token after an assistant message.",
            )
        self.stop = stop

    def _template_stop(self) -> int | None:
        """The first of the special tokens that a rendered answer ends with; white space among them is passed over."""
        ids = self.ids([self.render(_PROBE, generation=False)], specials=False)[0]
        special = {*self._tokenizer.all_special_ids, self.eos}
        special |= {index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        stop: int | None = None
        for token in reversed(ids):
            if token in special:
                stop = token
            elif self._tokenizer.decode([token]).strip():
                break
        return stop

    def render(self, messages: Sequence[Message], generation: bool) -> str:
        """The chat template's text; `generation` adds what begins an answer."""
        text: str = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation
        )
        return text

    def ids(self, texts: Sequence[str], specials: bool) -> list[list[int]]:
        """Token ids of each text; `specials`: the tokenizer adds its BOS (and whatever else it is set to add)."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=specials, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these tokens, special ones included."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def opened(self, ids: list[int]) -> list[int]:
        """Without the EOS that some tokenizers add at the end."""
        return ids[:-1] if ids and ids[-1] == self.eos and len(ids) > 1 else ids

    def closed(self, ids: list[int]) -> list[int]:
        """With exactly one EOS at the end."""
        return ids if ids and ids[-1] == self.eos else [*ids, self.eos]

    def refuse_double_bos(self, ids: list[int]) -> None:
        """RowRefused where the text brings the BOS that the tokenizer or the template adds already."""
        if self.bos is not None and self.bos != self.eos and ids[:2] == [self.bos, self.bos]:
            raise RowRefused(
                "DoubleBOS", f"the text begins with the BOS token (id {self.bos}) a second time: remove it there"
            )
