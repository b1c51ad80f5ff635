"""manifest.json of an output: what an exported model is, and what an adapter belongs to.

Written by export.py last, read by adapters.py when a later job starts from the output. An adapter means nothing without
its base: the manifest carries the base's identity and the adapters that were merged into it before.
"""

from __future__ import annotations

from typing import Literal

from posttrain_api.base import Model
from posttrain_api.trainer import JobIdentity
from posttrain_trainer.checkpoint_files import FileEntry


class Base(Model):
    """The model an adapter belongs to, or full fine-tuning started from. uri None: drawn from the seed."""

    uri: str | None = None
    revision: str | None = None
    sha256: str


class Parent(Model):
    """An adapter that was merged into the base. `sha256`: over its configuration and its weights."""

    uri: str
    revision: str | None = None
    sha256: str


class OutputManifest(Model):
    """`adapters`: merged into `base` before training began, oldest first. `quantization`: how the base was kept while
    the adapter was trained, None: in full. `sha256`: over names and digests of the files."""

    format: Literal["safetensors", "peft"]
    stage: str
    tuning: str
    step: int
    job: JobIdentity
    base: Base
    adapters: tuple[Parent, ...] = ()
    quantization: Literal["NF4"] | None = None
    files: dict[str, FileEntry]
    sha256: str
