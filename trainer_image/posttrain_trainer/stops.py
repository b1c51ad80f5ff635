"""Which tokens end a completion.

Called by `prepare`, which shows them and writes them into the manifest for the rollouts. A stop token that is left out
costs more than any other mistake here: completions run on to maxNewTokens and no reward finds its answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from posttrain_api.reasons import Reason
from posttrain_trainer.data.vocabulary import Vocabulary
from posttrain_trainer.errors import TrainerFailure, describe
from posttrain_trainer.model_files import load_config

FILE = "generation_config.json"


def stops(tokenizer: Any, generation_config: Any, chat: bool) -> tuple[int, ...]:
    """Token ids, each once: what ends an answer in the chat template where `chat`, the tokenizer's EOS, and those of
    the generation config. TrainerFailure(ModelIncompatible) where there is none, or a template that ends no answer."""
    found: list[int] = []
    if chat:
        vocabulary = Vocabulary(tokenizer, "the tokenizer")
        vocabulary.require_chat()
        found.append(vocabulary.stop)
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    listed = getattr(generation_config, "eos_token_id", None)
    found += listed if isinstance(listed, list | tuple) else [] if listed is None else [listed]
    if not found:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"no token ends a completion: neither the tokenizer nor {FILE} has an EOS token. Set eos_token in "
            f"tokenizer_config.json or eos_token_id in {FILE}.",
        )
    return tuple(dict.fromkeys(found))


def generation_config_of(folder: Path, where: str, trust_remote_code: bool) -> Any:
    """generation_config.json of a model folder; where it has none, its config.json, whose `eos_token_id` transformers
    would take. TrainerFailure(ModelIncompatible) where it cannot be read."""
    if not (folder / FILE).is_file():
        return load_config(folder, where, trust_remote_code).get_text_config()
    try:
        return transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE, f"{where}: {folder / FILE} cannot be read: {describe(error)}. Mend or remove it."
        ) from error
