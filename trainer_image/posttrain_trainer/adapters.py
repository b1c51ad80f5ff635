"""Adapters of earlier jobs: read, checked against the model they are meant for, merged into it or trained further.

Called by `prepare` before any rank starts (read, check), then by the model's loading (merge) and lora.py (continue). A
chain is merged in memory, oldest first, in fp32; no file of the base is changed. An adapter on another base than its
own loads without an error and says nonsense: its output manifest tells which base it belongs to.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from posttrain_api.reasons import Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.checkpoint_files import MANIFEST
from posttrain_trainer.errors import TrainerFailure, describe
from posttrain_trainer.lazy import Lazy
from posttrain_trainer.model_files import digest_of, require_folder
from posttrain_trainer.output_manifest import OutputManifest

peft = Lazy("peft")
SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_MODEL = "base_model.model."
"""peft's name for the model inside it, in the names of an adapter's tensors."""
_log = logging.getLogger("posttrain.adapters")


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, read. `where`: as the user names it; `shapes` of its tensors by peft's names."""

    folder: Path
    where: str
    digest: str
    settings: Any
    shapes: dict[str, tuple[int, ...]]
    manifest: OutputManifest | None

    @property
    def scores(self) -> bool:
        """Whether it has a reward model's head."""
        return str(self.settings.task_type) == "SEQ_CLS"


def read_adapter(folder: Path, where: str) -> Adapter:
    """TrainerFailure(ModelNotFound) where files are missing, (ModelIncompatible) where they are no LoRA adapter or do
    not belong together."""
    require_folder(folder, where)
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            listed = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
            raise TrainerFailure(
                Reason.MODEL_NOT_FOUND,
                f"{where}: no {name} in {folder}, which an adapter has; it has: {listed}. Name the adapter's folder.",
            )
    settings = _settings(folder, where)
    shapes = _shapes(folder / WEIGHTS, where)
    _check_ranks(settings, shapes, where)
    return Adapter(folder, where, digest_of(adapter_files(folder)), settings, shapes, _manifest(folder, where))


def adapter_files(folder: Path) -> list[Path]:
    """What an adapter is, and what its digest is over."""
    return [folder / SETTINGS, folder / WEIGHTS]


def _settings(folder: Path, where: str) -> Any:
    try:
        settings = peft.PeftConfig.from_pretrained(folder)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise _misfit(where, f"{SETTINGS} cannot be read ({describe(error)})", "Copy it again.") from error
    if not isinstance(settings, peft.LoraConfig):
        raise _misfit(where, f"it is a {settings.peft_type} adapter", "Only LoRA adapters can be used.")
    return settings


def _shapes(file: Path, where: str) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _misfit(where, f"{file.name} is no safetensors file ({describe(error)})", "Copy it again.") from error


def _check_ranks(settings: Any, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    if settings.rank_pattern:
        return  # ranks differ by layer on purpose: peft's loading compares them
    for name, shape in shapes.items():
        if name.endswith("lora_A.weight") and shape[0] != settings.r:
            raise _misfit(
                where,
                f"{SETTINGS} says rank {settings.r}, but {name} in {WEIGHTS} has rank {shape[0]}",
                "The two files are of different adapters: copy them again.",
            )


def _manifest(folder: Path, where: str) -> OutputManifest | None:
    """Beside the adapter, or above it where a merged model was exported too. None for an adapter that is no output of
    a job."""
    for place in (folder, folder.parent) if folder.name == "adapter" else (folder,):
        try:
            return OutputManifest.model_validate_json((place / MANIFEST).read_text())
        except FileNotFoundError:
            continue
        except ValidationError as error:
            _log.warning("%s: %s is not one of ours: %s", where, place / MANIFEST, error)
    return None


def check_base(adapter: Adapter, base: str, before: Sequence[Adapter]) -> None:
    """The adapter was trained on this base (by digest) with these adapters merged into it.
    TrainerFailure(ModelIncompatible)."""
    if adapter.manifest is None:
        _log.warning("%s: no %s: it cannot be checked that it belongs to this base", adapter.where, MANIFEST)
        return
    theirs = adapter.manifest.base
    if theirs.sha256 != base:
        raise _misfit(
            adapter.where,
            f"it was trained on another base: {theirs.uri or 'a model drawn from a seed'} ({theirs.sha256}), and this "
            f"job's is {base}",
            "Start from its own base.",
        )
    chain = [parent.sha256 for parent in adapter.manifest.adapters]
    if chain != [each.digest for each in before]:
        names = [parent.uri for parent in adapter.manifest.adapters] or "none"
        raise _misfit(
            adapter.where,
            f"it was trained on its base with these adapters merged: {names}, and here come before it: "
            f"{[each.where for each in before] or 'none'}",
            "Name the same adapters in the same order.",
        )


def check_fits(adapter: Adapter, config: Any, *, trust_remote_code: bool = False) -> None:
    """Every layer of the adapter is a layer of the model of this configuration and has its size. No weight is made.
    TrainerFailure(ModelIncompatible)."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    modules = dict(model.named_modules())
    for name, shape in adapter.shapes.items():
        layer, dot, kind = name.removeprefix(_MODEL).rpartition(".lora_")
        if not dot or kind not in ("A.weight", "B.weight"):
            continue
        module = modules.get(layer)
        if module is None:
            raise _misfit(adapter.where, f"this model has no module {layer!r}", "Use the adapter's own base.")
        if not isinstance(module, nn.Linear):
            continue  # peft's loading compares the sizes of others
        features, own = (module.in_features, shape[1]) if kind == "A.weight" else (module.out_features, shape[0])
        if features != own:
            raise _misfit(
                adapter.where, f"{name} is {list(shape)}, and {layer} has {features}", "Use the adapter's own base."
            )


def check_use(folders: Sequence[tuple[Path, str]], config: TrainerConfig) -> None:
    """The stage can start from these adapters, and go on with the last one where it is asked to; (folder, URI), oldest
    first. TrainerFailure(ModelIncompatible)."""
    chain = [read_adapter(folder, where) for folder, where in folders]
    for adapter in chain:
        if adapter.scores and config.stage != "RewardModel":
            raise _misfit(adapter.where, f"it is a reward model's, and {config.stage} trains a policy", "Use another.")
    if config.lora is None or not config.lora.continue_adapter:
        return
    if not chain:
        raise _misfit("spec.lora.continueAdapter", "the model has no adapter", "Name one with model.fromJob.")
    last, rank = chain[-1], config.lora.rank
    if rank is not None and rank != last.settings.r:
        raise _misfit(
            "spec.lora.rank",
            f"it is {rank}, and the adapter to go on with, {last.where}, has rank {last.settings.r}",
            "Leave rank out, or set continueAdapter: false for a new adapter.",
        )
    if last.scores != (config.stage == "RewardModel"):
        raise _misfit(
            last.where,
            f"it was trained for task {last.settings.task_type}, and {config.stage} cannot go on with it",
            "Set continueAdapter: false: it is merged then and a new one is trained.",
        )


def merge_adapters(model: nn.Module, folders: Sequence[Path]) -> Any:
    """W + scale·B·A of each adapter in turn, oldest first, in the model's own type. A reward model's head is taken from
    the last that has one."""
    merged: Any = model
    for folder in folders:
        settings = peft.PeftConfig.from_pretrained(folder)
        settings.task_type = None  # peft's wrapper of a task asks for more than a merge needs
        merged = put_on(merged, folder, settings).merge_and_unload(safe_merge=True)
    return merged.requires_grad_(True) if folders else merged  # peft has frozen it


def put_on(model: nn.Module, folder: Path, settings: Any, *, trainable: bool = False) -> Any:
    """The model with this adapter under the name `default`. TrainerFailure where a tensor of either is left over: peft
    only warns."""
    adapted = peft.PeftModel.from_pretrained(
        model, folder, config=settings, is_trainable=trainable, autocast_adapter_dtype=False
    )
    wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    given = {name for name in peft.load_peft_weights(folder, device="cpu") if ".base_layer." not in name}
    if given != wanted:
        raise _misfit(
            str(folder),
            f"{len(given ^ wanted)} of its tensors do not fit this model, the first is {min(given ^ wanted)}",
            "Use the adapter's own base.",
        )
    return adapted


def _misfit(where: str, what: str, advice: str) -> TrainerFailure:
    return TrainerFailure(Reason.MODEL_INCOMPATIBLE, f"{where}: {what}. {advice}")
