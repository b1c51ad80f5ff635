"""The starting model: a given one, checked; or one made from its shape, with its tokenizer. Called by `prepare`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from posttrain_api.reasons import Reason
from posttrain_api.trainer import ModelConfig, Scratch
from posttrain_trainer import model_files, tokenizer
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.fetch import Fetcher

SCRATCH_CONFIGS = {"Llama": transformers.LlamaConfig, "Qwen3": transformers.Qwen3Config}
_ARCHITECTURES = {"Llama": "LlamaForCausalLM", "Qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class StartModel:
    """A model folder and what is known of it. `positions`: the longest sequence it was made for, None where it has no
    limit; `parameters` 0 where the files do not say it."""

    folder: Path
    digest: str
    tokenizer: Any
    where: str
    positions: int | None
    parameters: int
    revision: str | None = None


def given_model(model: ModelConfig, fetcher: Fetcher) -> StartModel:
    """The model of `model.source`, fetched and checked; its tokenizer with `chatTemplate` in place if one is set."""
    if model.source is None:
        raise TrainerFailure(Reason.MODEL_NOT_FOUND, "model: neither source nor scratch is set.")
    uri = model.source.uri
    fetched = fetcher.fetch(model.source, "model")
    folder = fetched.path
    model_files.require_folder(folder, uri)
    weights = model_files.weight_files(folder, uri)
    config = model_files.load_config(folder, uri, model.trust_remote_code)
    loaded = tokenizer.load(folder, model.trust_remote_code)
    if model.chat_template is not None:
        loaded.chat_template = model.chat_template
    text = config.get_text_config()
    require_vocabulary(loaded, text.vocab_size, uri)
    return StartModel(
        folder=folder,
        digest=model_files.digest_of([folder / model_files.CONFIG, *weights]),
        tokenizer=loaded,
        where=uri,
        positions=getattr(text, "max_position_embeddings", None),
        parameters=model_files.count_parameters(weights, uri),
        revision=fetched.revision,
    )


def scratch_model(scratch: Scratch, folder: Path, fetcher: Fetcher, texts: Callable[[], Iterable[str]]) -> StartModel:
    """Writes config.json of the shape to `folder`; the tokenizer is the given one, or trained from `texts()`."""
    if scratch.tokenizer is not None:
        where = scratch.tokenizer.uri
        source = fetcher.fetch(scratch.tokenizer, "model").path
        model_files.require_folder(source, where)
        chosen = tokenizer.load(source, trust_remote_code=False)
    else:
        where = "model.scratch"
        chosen = tokenizer.train(texts(), scratch.vocab_size, scratch.max_length)
    require_vocabulary(chosen, scratch.vocab_size, where)
    folder.mkdir(parents=True, exist_ok=True)
    config = _scratch_config(scratch, chosen)
    config.save_pretrained(folder)
    return StartModel(
        folder=folder,
        digest=model_files.digest_of([folder / model_files.CONFIG]),
        tokenizer=chosen,
        where=where,
        positions=scratch.max_length,
        parameters=0,
    )


def _scratch_config(scratch: Scratch, chosen: Any) -> Any:
    return SCRATCH_CONFIGS[scratch.family](
        vocab_size=scratch.vocab_size,
        hidden_size=scratch.hidden_size,
        intermediate_size=scratch.intermediate_size,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=scratch.kv_heads,
        head_dim=scratch.head_dim,
        max_position_embeddings=scratch.max_length,
        bos_token_id=chosen.bos_token_id,
        eos_token_id=chosen.eos_token_id,
        pad_token_id=chosen.pad_token_id,
        architectures=[_ARCHITECTURES[scratch.family]],
        dtype="float32",
    )


def require_vocabulary(chosen: Any, vocab_size: int, where: str) -> None:
    """ModelIncompatible where the tokenizer has ids that the model cannot embed."""
    if len(chosen) > vocab_size:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{where}: the tokenizer has {len(chosen)} tokens, the model embeds {vocab_size}. "
            "Use the model's own tokenizer, or raise model.scratch.vocabSize.",
        )
