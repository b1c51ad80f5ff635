"""The finished model: a folder that plain transformers or peft loads, with a manifest that says what it is.

Called by the worker after the loop, on rank 0. The folder is written as output.tmp-<attempt> and renamed, so `output`
is whole or not there, and an attempt that was cut off cannot write into its successor's. Full fine-tuning: the model.
LoRA: the adapter; with `mergeAdapter` the merged model, and the adapter in `adapter/`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import transformers
from torch import Tensor, nn

from posttrain_api.base import canonical_json
from posttrain_api.names import OUTPUT_DIR
from posttrain_api.records import Output
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import nf4
from posttrain_trainer.adapters import merge_adapters
from posttrain_trainer.checkpoint_files import MANIFEST, FileEntry, entries, files_below, sync, write_json
from posttrain_trainer.fence import Fence
from posttrain_trainer.lora import POLICY
from posttrain_trainer.model import load_start, start_folder
from posttrain_trainer.output_manifest import Base, OutputManifest, Parent
from posttrain_trainer.prepared import Prepared
from posttrain_trainer.scorer import causal_lm
from posttrain_trainer.signs import growing

ADAPTER_DIR = "adapter"
_PREFIX = "lm."
"""The scorer's name for the model inside it."""


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
        if config.stage == "RewardModel":
            _set_pad_token(temporary, finished.module)
        with growing(temporary):
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
    # Outside of it there is only a critic's head.
    weights = {name.removeprefix(_PREFIX): each for name, each in finished.weights.items() if name.startswith(_PREFIX)}
    if config.tuning == "Full":
        causal_lm(module.lm).save_pretrained(folder, state_dict=weights)
        return "safetensors"
    name = _base_name(config, prepared)
    _write_adapter(module.lm, name, weights, folder / ADAPTER_DIR if config.merge_adapter else folder)
    if not config.merge_adapter:
        return "peft"
    merged(config, prepared, folder / ADAPTER_DIR).save_pretrained(folder)
    return "safetensors"


def _write_adapter(adapted: Any, base: tuple[str | None, str | None], weights: dict[str, Tensor], folder: Path) -> None:
    settings = adapted.peft_config[POLICY]
    settings.base_model_name_or_path, settings.revision = base
    if isinstance(settings.target_modules, set):  # in the order of the hash seed: two exports would differ
        settings.target_modules = sorted(settings.target_modules)
    # peft's names carry no adapter name; save_pretrained takes the learning weights as they are and renames them. The
    # base's embeddings are never among them, and to ask whether they were resized it would call the hub.
    # Only the policy's adapter: a critic may have one beside it.
    adapted.save_pretrained(folder, selected_adapters=[POLICY], state_dict=weights, save_embedding_layers=False)


def merged(config: TrainerConfig, prepared: Prepared, adapter: Path) -> Any:
    """W + scale·B·A, computed anew from the stored base, its earlier adapters and this one, in fp32, so that nothing
    live is changed; rounded once at the end where training was in bf16. W is what the adapter was trained on: where the
    base was kept in 4 bits, what these stand for."""
    model = load_start(config, prepared)
    if nf4.asked(config):
        nf4.round_weights(model)
    model = merge_adapters(model, [adapter])
    return model.bfloat16() if prepared.resolved.precision == "BF16" else model


def _write_tokenizer(prepared: Prepared, folder: Path) -> None:
    """File by file, as it was trained with: loading and saving may change it, and may need its own Python code."""
    shutil.copytree(prepared.tokenizer_dir, folder, dirs_exist_ok=True)


def _set_pad_token(folder: Path, module: Any) -> None:
    """A batch padded with another token than the reward model's would be read at the wrong place."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    token = tokenizer.convert_ids_to_tokens(causal_lm(module.lm).config.pad_token_id)
    if token != tokenizer.pad_token:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": token}, indent=2, ensure_ascii=False))


def _manifest(
    config: TrainerConfig,
    prepared: Prepared,
    step: int,
    written: tuple[Literal["safetensors", "peft"], dict[str, FileEntry]],
) -> OutputManifest:
    kind, files = written
    digests = canonical_json({name: entry.sha256 for name, entry in files.items()})
    return OutputManifest(
        format=kind,
        stage=config.stage,
        tuning=config.tuning,
        step=step,
        job=config.job,
        base=_base(config, prepared),
        adapters=_parents(config, prepared),
        quantization="NF4" if nf4.asked(config) else None,
        files=files,
        sha256="sha256:" + hashlib.sha256(digests.encode()).hexdigest(),
    )


def _base(config: TrainerConfig, prepared: Prepared) -> Base:
    source = config.model.source
    return Base(uri=source.uri if source else None, revision=prepared.resolved.revision, sha256=prepared.model_digest)


def _parents(config: TrainerConfig, prepared: Prepared) -> tuple[Parent, ...]:
    """The adapters below what was trained; one that was trained further is in the output itself."""
    below = len(start_folder(config, prepared).adapters)
    pairs = list(zip(config.model.adapters, prepared.adapters, strict=True))[:below]
    return tuple(Parent(uri=source.uri, revision=adapter.revision, sha256=adapter.digest) for source, adapter in pairs)


def _base_name(config: TrainerConfig, prepared: Prepared) -> tuple[str | None, str | None]:
    """What AutoPeftModel looks the base up by: the hub's name, or the folder it was mounted at; else the URI,
    for people. With earlier adapters below it, a sentence: no loader must put the adapter on the bare base."""
    source = config.model.source
    if source is None:
        return None, None
    parents = _parents(config, prepared)
    if parents:
        return f"{source.uri} with {len(parents)} adapters merged into it: see {MANIFEST}", None
    if source.uri.startswith("hf://"):
        return source.uri.removeprefix("hf://"), prepared.resolved.revision or source.revision
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
