"""Is this folder a causal language model that can be trained? Names and headers only: no weight is loaded here.

Called by `prepare`, so that a wrong path costs seconds, not an allocation of GPUs. Also counts the parameters and
makes the digest that ties a checkpoint to its model.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure, describe
from posttrain_trainer.nearest import nearest_names

CONFIG = "config.json"
SINGLE = ("model.safetensors", "pytorch_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def require_folder(folder: Path, uri: str) -> None:
    """ModelNotFound where there is no such folder; the nearest names are in the message."""
    if not folder.is_dir():
        raise TrainerFailure(Reason.MODEL_NOT_FOUND, f"{uri}: {folder} is no folder. {nearest_names(folder)}")


def weight_files(folder: Path, uri: str) -> list[Path]:
    """The files with the weights, sorted. ModelNotFound where there are none, or where an index names one that is
    missing.
    """
    for name in INDEXES:
        if (folder / name).is_file():
            return _sharded(folder, folder / name, uri)
    for name in SINGLE:
        if (folder / name).is_file():
            return [folder / name]
    listed = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    if (folder / "adapter_config.json").is_file():
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{uri}: {folder} is an adapter without its base model. Merge it first (output.mergeAdapter: true).",
        )
    raise TrainerFailure(
        Reason.MODEL_NOT_FOUND,
        f"{uri}: no weights in {folder}: looked for {', '.join((*SINGLE, *INDEXES))}; it has: {listed}. Correct the "
        "path.",
    )


def _sharded(folder: Path, index: Path, uri: str) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise TrainerFailure(Reason.MODEL_INCOMPATIBLE, f"{index}: not a weight index ({describe(error)}).") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise TrainerFailure(
            Reason.MODEL_NOT_FOUND,
            f"{uri}: {index.name} names {len(missing)} files that are not in {folder}: {', '.join(missing[:5])}. "
            "Copy them.",
        )
    return [folder / name for name in names]


def load_config(folder: Path, uri: str, trust_remote_code: bool) -> Any:
    """The model's config. ModelNotFound without config.json; ModelIncompatible where it is no trainable causal LM."""
    if not (folder / CONFIG).is_file():
        listed = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise TrainerFailure(
            Reason.MODEL_NOT_FOUND, f"{uri}: no {CONFIG} in {folder}; it has: {listed}. Correct the path."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{uri}: {folder / CONFIG} cannot be read by transformers {transformers.__version__}: {describe(error)}. "
            "Use a model that this version knows, or another trainer image.",
        ) from error
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not remote:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE, f"{uri}: model type {config.model_type!r} is no causal language model. Use one."
        )
    if getattr(config, "quantization_config", None):
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE,
            f"{uri}: its weights are quantized and cannot be trained. Use the unquantized model.",
        )
    return config


def count_parameters(files: Iterable[Path], uri: str) -> int:
    """Elements of all tensors, by the headers of safetensors files (0 for other formats). ModelIncompatible if torn."""
    return sum(_elements(file, uri) for file in files if file.suffix == ".safetensors")


def _elements(file: Path, uri: str) -> int:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length) if length <= size else b"")
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
        elements = sum(math.prod(entry["shape"]) for entry in tensors)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE, f"{uri}: {file} is no safetensors file ({describe(error)}). Copy it again."
        ) from error
    if expected != size:
        raise TrainerFailure(
            Reason.MODEL_INCOMPATIBLE, f"{uri}: {file} has {size} bytes, its header says {expected}. Copy it again."
        )
    return int(elements)


def digest_of(files: Iterable[Path]) -> str:
    """`sha256:<hex>` over names, sizes and contents, in order of name."""
    return _digest((file.name, file) for file in files)


def folder_digest(folder: Path) -> str:
    """The same over every file below `folder`, by its name from there: a tokenizer keeps further chat templates in a
    folder of their own."""
    return _digest((str(file.relative_to(folder)), file) for file in folder.rglob("*") if file.is_file())


def _digest(named: Iterable[tuple[str, Path]]) -> str:
    whole = hashlib.sha256()
    for name, file in sorted(named):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{name} {file.stat().st_size} {content}\n".encode())
    return "sha256:" + whole.hexdigest()
