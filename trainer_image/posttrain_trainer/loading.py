"""From a model folder to a model in memory: fp32, on the CPU, every weight read from the folder.

Called by model.py for the model that is trained, by reference.py for the one it is compared with, by export.py for the
base of a merged model. Nothing here is drawn at random but a reward model's new head, and nothing trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from posttrain_api.reasons import Reason
from posttrain_trainer.adapters import merge_adapters, read_adapter
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.score_model import HEAD, ScoreHead, check_scores, pad_token, set_head
from posttrain_trainer.scorer import check_head


@dataclass(frozen=True)
class ModelFolder:
    """Where a model is and how it is loaded. `adapters` are merged into it, oldest first; `attention`: transformers'
    name of the kernel."""

    path: Path
    adapters: tuple[Path, ...] = ()
    attention: str = "sdpa"
    trust_remote_code: bool = False


def load_causal(folder: ModelFolder) -> Any:
    """A causal language model that the scorer can run. TrainerFailure(ModelIncompatible)."""
    model, info = _read(transformers.AutoModelForCausalLM, folder)
    _check_complete(folder.path, info, drawn=())
    model = merge_adapters(model, folder.adapters)
    check_head(model)
    return model


def load_reward(folder: ModelFolder, tokenizer: Path, seed: int) -> Any:
    """A reward model: an earlier one with its head, or a causal language model's body with a new head drawn from
    `seed`. TrainerFailure(ModelIncompatible)."""
    model, info = _read(transformers.AutoModelForSequenceClassification, folder, num_labels=1)
    head = f"{HEAD}.weight"
    _check_complete(folder.path, info, drawn=(head,))
    set_head(model, seed, draw=head in (info.get("missing_keys") or ()))
    model = merge_adapters(model, folder.adapters)
    set_pad_token(model, tokenizer)
    check_scores(model)
    return model


def load_scores(folder: ModelFolder) -> Any:
    """A reward model that scores and never learns: its head is its own or comes with an adapter.
    TrainerFailure(ModelIncompatible)."""
    model, info = _read(transformers.AutoModelForSequenceClassification, folder, num_labels=1)
    brought = any(read_adapter(adapter, str(adapter)).scores for adapter in folder.adapters)
    _check_complete(folder.path, info, drawn=(f"{HEAD}.weight",) if brought else ())
    set_head(model, 0, draw=False)
    model = merge_adapters(model, folder.adapters)
    check_scores(model)
    return model


def load_critic(folder: ModelFolder) -> tuple[Any, ScoreHead]:
    """A body and a head for values: an earlier reward model's or critic's both (Stiennon et al. 2020, §3.4), or a
    language model's body and a head of zeros: then advantages are rewards until it has learned something.
    TrainerFailure(ModelIncompatible)."""
    model, info = _read(transformers.AutoModelForSequenceClassification, folder, num_labels=1)
    name = f"{HEAD}.weight"
    _check_complete(folder.path, info, drawn=(name,))
    set_head(model, 0, draw=False)
    if name in (info.get("missing_keys") or ()):
        torch.nn.init.zeros_(getattr(model, HEAD).weight)
    model = merge_adapters(model, folder.adapters)  # a reward model's adapter brings its head
    check_scores(model)
    return model.base_model, getattr(model, HEAD)


def set_pad_token(model: Any, tokenizer: Path) -> None:
    """Writes the reward model's pad token into its configuration. After the model is made: its embedding would leave
    the row of a pad token untrained."""
    chosen = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    number = chosen.convert_tokens_to_ids(pad_token(chosen, vocabulary, str(tokenizer)))
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = number


def _read(kind: Any, folder: ModelFolder, **options: Any) -> tuple[Any, dict[str, Any]]:
    try:
        model, info = kind.from_pretrained(
            folder.path,
            local_files_only=True,
            trust_remote_code=folder.trust_remote_code,
            attn_implementation=folder.attention,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        what = "a causal language model" if kind is transformers.AutoModelForCausalLM else "a reward model"
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{folder.path}: transformers {transformers.__version__} cannot load it as {what}: {error}. "
            "Check that config.json and the safetensors files belong together.",
        ) from error
    return model, info


def _check_complete(folder: Path, info: dict[str, Any], drawn: tuple[str, ...]) -> None:
    for what in ("missing_keys", "mismatched_keys"):
        found = {str(key[0] if isinstance(key, tuple) else key) for key in info.get(what) or ()}
        names = sorted(found - set(drawn if what == "missing_keys" else ()))
        if names:
            raise TrainerFailure(
                Reason.MODEL_INCOMPATIBLE,
                f"{folder}: {len(names)} weights are {what.removesuffix('_keys')}, the first is {names[0]}. "
                "They would be drawn at random; give a folder whose weights fit its config.json.",
            )
