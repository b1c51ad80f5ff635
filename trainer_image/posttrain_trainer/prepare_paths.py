"""Where an attempt of `prepare` writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posttrain_api.names import PREPARED_DIR
from posttrain_api.trainer import TrainerConfig


@dataclass(frozen=True)
class Paths:
    """Folders of this attempt. `hub` is shared by attempts: a download goes on where it stopped. `files`: the record
    of the data's files at the first attempt."""

    root: Path
    attempt: Path
    hub: Path
    cache: Path
    files: Path

    @classmethod
    def of(cls, config: TrainerConfig, attempt: str) -> Paths:
        """The folders of a config."""
        root = Path(config.run_dir) / PREPARED_DIR
        cache = Path(config.work_dir) / "datasets"
        return cls(root, root / f"attempt-{attempt}", root / "hub", cache, root / "files.json")
