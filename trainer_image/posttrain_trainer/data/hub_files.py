"""Which files of a downloaded hub data set belong to a subset and a split: the hub's own rules, by `datasets`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets

from posttrain_api.reasons import Reason
from posttrain_api.trainer import DataSource
from posttrain_trainer.data.readers import FORMATS, DataFile
from posttrain_trainer.errors import TrainerFailure, describe

DEFAULT_SPLITS = {"train": ("train",), "eval": ("validation", "test")}


def hub_files(folder: Path, source: DataSource, role: str, cache: Path) -> list[DataFile]:
    """The files of the source's split; without one: `train` to train on, `validation` or else `test` to evaluate on.

    DatasetSchemaInvalid where the subset or the split does not exist or the files have no format that is read here.
    """
    try:
        builder: Any = datasets.load_dataset_builder(str(folder), name=source.subset, cache_dir=str(cache))
    except (ValueError, OSError) as error:
        raise TrainerFailure(
            Reason.DATASET_SCHEMA_INVALID,
            f"{source.uri}: subset {source.subset!r} cannot be read: {describe(error)}. Set data's subset.",
        ) from error
    by_split: dict[str, list[str]] = {str(split): list(files) for split, files in builder.config.data_files.items()}
    split = _split(source, role, list(by_split))
    return [_file(Path(path), folder, source) for path in by_split[split]]


def _split(source: DataSource, role: str, splits: list[str]) -> str:
    wanted = (source.split,) if source.split else DEFAULT_SPLITS[role]
    for split in wanted:
        if split in splits:
            return split
    if source.split is None and len(splits) == 1:
        return splits[0]
    raise TrainerFailure(
        Reason.DATASET_SCHEMA_INVALID,
        f"{source.uri}: no split {' or '.join(wanted)}; it has: {', '.join(splits)}. Set data.{role}[].split.",
    )


def _file(path: Path, folder: Path, source: DataSource) -> DataFile:
    if path.suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise TrainerFailure(
            Reason.DATASET_SCHEMA_INVALID, f"{source.uri}: {path.name} is none of {known}. Convert it."
        )
    # By name, not by content: in a download folder files are links to blobs without a name.
    return DataFile(path, os.path.relpath(path, folder), FORMATS[path.suffix])
