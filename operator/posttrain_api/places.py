"""Where something is: a location that the plan has turned into what a pod sees. Part of TrainerConfig."""

from __future__ import annotations

from posttrain_api.base import Model


class Source(Model):
    """A model or data location. `path` is where it is mounted; None for `hf://`, `s3://` and `gs://`,
    which `prepare` downloads.

    `secret_path` is the folder with the keys of the source's Secret, one file each."""

    uri: str
    path: str | None = None
    secret_path: str | None = None
    revision: str | None = None
    """Of an hf:// source: branch, tag or 40-hex commit asked for."""
