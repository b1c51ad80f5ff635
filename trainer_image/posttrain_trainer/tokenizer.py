"""The tokenizer of a job: loaded with the model, given for a scratch model, or trained from the training texts.

Called by `prepare`. A trained one is byte-level BPE (any text is representable), splits digits, has its pad token
apart from EOS, no BOS, and a small chat template whose turns end with EOS, with generation markers. Equal texts give
equal files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure, describe

EOS = "<|endoftext|>"
PAD = "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
"""One token each: a turn costs a small model no more than it must."""
SPECIALS = (EOS, PAD, *ROLES)
MAX_SAMPLE_CHARACTERS = 256 * 1024 * 1024
"""A vocabulary is settled long before: more text only costs memory."""

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + eos_token }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def load(folder: Path, trust_remote_code: bool) -> Any:
    """The tokenizer in `folder`, without network. ModelIncompatible where it cannot be loaded."""
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{folder}: no tokenizer can be loaded from it ({describe(error)}). It needs tokenizer.json, or the "
            "files of "
            "a tokenizer that transformers knows, and tokenizer_config.json.",
        ) from error


def train(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """A new tokenizer of at most `vocab_size` tokens. ModelIncompatible where bytes and special tokens do not fit."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + len(SPECIALS)
    if vocab_size < least:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"model.scratch.vocabSize is {vocab_size}; a byte-level tokenizer needs at least {least}. Raise it.",
        )
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(_bounded(texts), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _bounded(texts: Iterable[str]) -> Iterator[str]:
    left = MAX_SAMPLE_CHARACTERS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
