"""The starting model: a given one, checked; or one made from its shape, with its tokenizer. Called by `prepare`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from posttrain_api.places import Source
from posttrain_api.reasons import Reason
from posttrain_api.trainer import ModelConfig, Scratch, TrainerConfig
from posttrain_trainer import model_files, tokenizer
from posttrain_trainer.adapters import Adapter, check_base, check_fits, check_use, read_adapter
from posttrain_trainer.errors import TrainerFailure, readable
from posttrain_trainer.fetch import Fetcher
from posttrain_trainer.prepared import PreparedAdapter
from posttrain_trainer.score_model import pad_token

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
    adapters: tuple[PreparedAdapter, ...] = ()


def starting_model(config: TrainerConfig, fetcher: Fetcher) -> StartModel:
    """`given_model` of the job, whose stage can start from it. TrainerFailure where it cannot."""
    start = given_model(config.model, fetcher)
    folders = [Path(adapter.dir) for adapter in start.adapters]
    check_use(list(zip(folders, [source.uri for source in config.model.adapters], strict=True)), config)
    if config.stage == "RewardModel":
        pad_token(start.tokenizer, len(start.tokenizer), start.where)
    return start


def reference_model(config: TrainerConfig, fetcher: Fetcher, start: StartModel) -> StartModel | None:
    """The reference policy where the job names one. TrainerFailure(ModelIncompatible) where it has another vocabulary:
    it is asked about the same tokens."""
    if config.reference is None:
        return None
    given = {"source": config.reference.source, "adapters": config.reference.adapters, "scratch": None}
    reference = given_model(config.model.model_copy(update=given), fetcher)
    if reference.tokenizer.get_vocab() != start.tokenizer.get_vocab():
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{reference.where}: the reference's tokenizer has another vocabulary than {start.where}'s. "
            "Use a reference of the same family.",
        )
    return reference


def given_model(model: ModelConfig, fetcher: Fetcher) -> StartModel:
    """The model of `model.source`, fetched and checked; its tokenizer with `chatTemplate` in place if one is set."""
    if model.source is None:
        raise TrainerFailure(Reason.MODEL_NOT_FOUND, "model: neither source nor scratch is set.")
    with readable(Reason.MODEL_ACCESS_DENIED, model.source.uri):
        return _given(model, model.source, fetcher)


def _given(model: ModelConfig, source: Source, fetcher: Fetcher) -> StartModel:
    uri = source.uri
    fetched = fetcher.fetch(source, "model")
    folder = fetched.path
    model_files.require_folder(folder, uri)
    weights = model_files.weight_files(folder, uri)
    config = model_files.load_config(folder, uri, model.trust_remote_code)
    digest = model_files.digest_of([folder / model_files.CONFIG, *weights])
    adapters = _adapters(model, fetcher, config, digest)
    loaded = tokenizer.load(_tokenizer_folder(folder, adapters), model.trust_remote_code)
    if model.chat_template is not None:
        loaded.chat_template = model.chat_template
    text = config.get_text_config()
    require_vocabulary(loaded, text.vocab_size, uri)
    return StartModel(
        folder=folder,
        digest=digest,
        tokenizer=loaded,
        where=uri,
        positions=getattr(text, "max_position_embeddings", None),
        parameters=model_files.count_parameters(weights, uri),
        revision=fetched.revision,
        adapters=adapters,
    )


def _tokenizer_folder(base: Path, adapters: Sequence[PreparedAdapter]) -> Path:
    """The newest adapter that brings a tokenizer, as every output does: with the chat template that it was trained on.
    Else the base."""
    brought = (Path(adapter.dir) for adapter in reversed(adapters))
    return next((folder for folder in brought if (folder / "tokenizer_config.json").is_file()), base)


def _adapters(model: ModelConfig, fetcher: Fetcher, config: Any, base: str) -> tuple[PreparedAdapter, ...]:
    """Fetched and checked, oldest first. TrainerFailure where one is none, or belongs to another base or another
    model."""
    read: list[Adapter] = []
    prepared = []
    for source in model.adapters:
        fetched = fetcher.fetch(source, "model")
        adapter = read_adapter(fetched.path, source.uri)
        check_base(adapter, base, read)
        check_fits(adapter, config, trust_remote_code=model.trust_remote_code)
        read.append(adapter)
        prepared.append(PreparedAdapter(dir=str(fetched.path), digest=adapter.digest, revision=fetched.revision))
    return tuple(prepared)


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
