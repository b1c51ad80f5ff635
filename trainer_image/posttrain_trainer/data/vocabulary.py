"""A tokenizer as the data code sees it: ids, the end-of-sequence token, the chat template and the token that ends an
answer.

Everything the tokenizer decides is asked here once and linted: no EOS, or a template that never ends an answer, and
no row could teach the model to stop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from posttrain_api.reasons import Reason
from posttrain_trainer.data.messages import Message, RowRefused
from posttrain_trainer.errors import TrainerFailure

_PROBE = ({"role": "user", "content": "Question 1"}, {"role": "assistant", "content": "Answer 2"})
_TWICE = (*_PROBE, {"role": "user", "content": "Question 3"}, {"role": "assistant", "content": "Answer 4"})
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


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

    @property
    def templated(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self._tokenizer.chat_template)

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

    def require_markers(self) -> None:
        """For loss on every assistant turn, after `require_chat`. ModelIncompatible where the template does not mark
        what the assistant writes, or marks something else."""
        if not _MARKERS.search(str(self._tokenizer.chat_template)):
            raise self._unmarked("has no {% generation %} markers")
        if not self._tokenizer.is_fast:
            raise self._unmarked("has them, but the tokenizer is none of the fast ones, which alone can follow them")
        tokens, mask = self.assistant_mask(_TWICE)
        marked = [tokens[start:stop] for start, stop in runs(mask)]
        if len(marked) != 2 or any(self.stop not in each for each in marked):
            texts = [self.decode(each) for each in marked]
            stop = self.decode([self.stop])
            raise self._unmarked(f"marks {texts} of two answers: each must be marked, with its stop token {stop!r}")

    def _unmarked(self, found: str) -> TrainerFailure:
        return TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{self._where}: data.lossOn is Assistant, which needs a chat template that encloses each answer and its "
            f"stop token in {{% generation %}} … {{% endgeneration %}}; this one {found}. Set model.chatTemplate to "
            "one that does, or data.lossOn: Completion to learn the last answer alone.",
        )

    def rewrites_earlier_turns(self) -> bool:
        """Whether the template shows an earlier answer otherwise once there is a later one, or takes only one."""
        try:
            whole = self.render(_TWICE, generation=False)
        except jinja2.TemplateError:
            return True
        return not whole.startswith(self.render(_PROBE, generation=False))

    def assistant_mask(self, messages: Sequence[Message]) -> tuple[list[int], NDArray[np.uint8]]:
        """Token ids of a chat and its mask, uint8 [T]: 1 in what the template marks as the assistant's."""
        encoded = self._tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), np.asarray(encoded["assistant_masks"], dtype=np.uint8)

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


def runs(mask: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Start and end of each stretch of ones."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
