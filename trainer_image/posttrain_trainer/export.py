"""The finished model: a folder that plain transformers or peft loads, with a manifest that says what it is.

Called by the worker after the loop, on rank 0. The folder is written as output.tmp-<attempt> and renamed, so `output`
is whole or not there, and an attempt that was cut off cannot write into its successor's. Full fine-tuning: the model.
LoRA: the adapter; with `mergeAdapter` the merged model, and the adapter in `adapter/`.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from torch import Tensor, nn

from posttrain_api.base import Model, canonical_json
from posttrain_api.names import OUTPUT_DIR
from posttrain_api.records import Output
from posttrain_api.trainer import JobIdentity, TrainerConfig
from posttrain_trainer.checkpoint_files import MANIFEST, FileEntry, entries, files_below, sync, write_json
from posttrain_trainer.fence import Fence
from posttrain_trainer.prepared import Prepared
from posttrain_trainer.scorer import causal_lm

ADAPTER_DIR = "adapter"
_PREFIX = "lm."
"""The scorer's name for the model inside it."""


class Base(Model):
    """The model an adapter belongs to, or full fine-tuning started from. uri None: drawn from the seed."""

    uri: str | None = None
    revision: str | None = None
    sha256: str


class OutputManifest(Model):
    """manifest.json of an output. `sha256`: over names and digests of the files."""

    format: Literal["safetensors", "peft"]
    stage: str
    tuning: str
    step: int
    job: JobIdentity
    base: Base
    files: dict[str, FileEntry]
    sha256: str


@dataclass(frozen=True)
class Finished:
    """What is exported: the trained module (its shapes and configuration), its learning weights, and whether this
    attempt may still write. `folder`: where, below the run's."""

    module: nn.Module
    weights: dict[str, Tensor]
    step: int
    fence: Fence
    folder: str = OUTPUT_DIR


def export(config: TrainerConfig, prepared: Prepared, finished: Finished) -> Output:
    """Writes `<run_dir>/<folder>` and describes it. Rank 0 only. A folder left by an earlier attempt is
    replaced; where a newer one has taken over, TrainerFailure(PeerLost) and nothing changes."""
    finished.fence.check()
    final = Path(config.run_dir) / finished.folder
    for left in final.parent.glob(finished.folder + ".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)  # it costs space only
    temporary = final.with_name(f"{finished.folder}.tmp-{finished.fence.attempt}")
    temporary.mkdir(parents=True)
    try:
        _write_tokenizer(prepared, temporary)
        kind = _write_model(config, prepared, finished, temporary)
        manifest = _manifest(config, prepared, finished.step, (kind, entries(temporary, files_below(temporary))))
        write_json(temporary / MANIFEST, manifest.to_wire())
        finished.fence.check()
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # best effort: the error itself is what matters
        raise
    put_in_place(temporary, final)
    size = sum(entry.size for entry in manifest.files.values())
    uri = f"{config.run_uri.rstrip('/')}/{finished.folder}"
    return Output(uri=uri, digest=manifest.sha256, format=manifest.format, size_bytes=size)


def _write_model(
    config: TrainerConfig, prepared: Prepared, finished: Finished, folder: Path
) -> Literal["safetensors", "peft"]:
    module: Any = finished.module
    weights = {name.removeprefix(_PREFIX): value for name, value in finished.weights.items()}
    if config.tuning == "Full":
        causal_lm(module.lm).save_pretrained(folder, state_dict=weights)
        return "safetensors"
    name = _base_name(config, prepared.resolved.revision)
    _write_adapter(module.lm, name, weights, folder / ADAPTER_DIR if config.merge_adapter else folder)
    if not config.merge_adapter:
        return "peft"
    merged(config, prepared, folder / ADAPTER_DIR).save_pretrained(folder)
    return "safetensors"


def _write_adapter(adapted: Any, base: tuple[str | None, str | None], weights: dict[str, Tensor], folder: Path) -> None:
    settings = adapted.peft_config["default"]
    settings.base_model_name_or_path, settings.revision = base
    if isinstance(settings.target_modules, set):  # in the order of the hash seed: two exports would differ
        settings.target_modules = sorted(settings.target_modules)
    # peft's names carry no adapter name; save_pretrained takes the learning weights as they are and renames them.
    adapted.save_pretrained(folder, state_dict=weights)


def merged(config: TrainerConfig, prepared: Prepared, adapter: Path) -> Any:
    """W + (alpha / rank)·B·A, computed anew from the stored base and adapter in fp32, so that nothing live is
    changed."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        prepared.model_dir,
        local_files_only=True,
        dtype=torch.float32,
        trust_remote_code=config.model.trust_remote_code,
    )
    return peft.PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True)


def _write_tokenizer(prepared: Prepared, folder: Path) -> None:
    """File by file, as it was trained with: loading and saving may change it, and may need its own Python code."""
    shutil.copytree(prepared.tokenizer_dir, folder, dirs_exist_ok=True)


def _manifest(
    config: TrainerConfig,
    prepared: Prepared,
    step: int,
    written: tuple[Literal["safetensors", "peft"], dict[str, FileEntry]],
) -> OutputManifest:
    kind, files = written
    source = config.model.source
    digests = canonical_json({name: entry.sha256 for name, entry in files.items()})
    return OutputManifest(
        format=kind,
        stage=config.stage,
        tuning=config.tuning,
        step=step,
        job=config.job,
        base=Base(
            uri=source.uri if source else None, revision=prepared.resolved.revision, sha256=prepared.model_digest
        ),
        files=files,
        sha256="sha256:" + hashlib.sha256(digests.encode()).hexdigest(),
    )


def _base_name(config: TrainerConfig, revision: str | None) -> tuple[str | None, str | None]:
    """What AutoPeftModel looks the base up by: the hub's name, or the folder it was mounted at; else the URI,
    for people."""
    source = config.model.source
    if source is None:
        return None, None
    if source.uri.startswith("hf://"):
        return source.uri.removeprefix("hf://"), revision or source.revision
    return source.path or source.uri, None


def put_in_place(temporary: Path, final: Path) -> None:
    """The finished folder takes its name; one of that name gives way. Rank 0 only."""
    sync(temporary)
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)  # of an attempt that was killed below
    if final.exists():
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)
    sync(final.parent)
