"""Tiny models on disk for the end-to-end tests: one that works, and each way in which one may not."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PREFIX_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_PREFIX_TEMPLATE = "{{ messages | length }} messages:" + PREFIX_TEMPLATE


def tokenizer(texts: list[str], vocabulary: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE with <eos> and a <pad> of its own, trained on `texts`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", chat_template=PREFIX_TEMPLATE
    )


def save(folder: Path, words: PreTrainedTokenizerFast, hidden: int = 32, length: int = 128) -> None:
    """A random Llama of two layers with this tokenizer."""
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=length,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def without_eos(folder: Path, words: PreTrainedTokenizerFast) -> None:
    """The same, but the tokenizer knows no end."""
    save(folder, words)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("eos_token")
    path.write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def pad_is_eos(folder: Path, words: PreTrainedTokenizerFast) -> None:
    """Padding and end are one token, as in many published models."""
    words = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, eos_token="<eos>", pad_token="<eos>")
    save(folder, words)


def without_weights(folder: Path, words: PreTrainedTokenizerFast) -> None:
    """config.json and tokenizer only."""
    save(folder, words)
    for path in folder.glob("*.safetensors"):
        path.unlink()
