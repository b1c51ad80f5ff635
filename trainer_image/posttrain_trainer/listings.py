"""What a bucket said it holds, kept beside the downloaded files: the revision of an s3:// or gs:// source.

Written and read by object_store.py. Nothing here asks a store.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

LISTING = "listing.json"

_log = logging.getLogger("posttrain.prepare")


@dataclass(frozen=True)
class Item:
    """One object: its name below the source's URI, bytes, and when it was written (ns since 1970)."""

    name: str
    size: int
    written: int


@dataclass(frozen=True)
class Listing:
    """The objects of a source. `single`: the URI names an object, not a folder of them."""

    single: bool
    items: tuple[Item, ...]

    @property
    def revision(self) -> str:
        """`sha256:<hex>` over names, sizes and times."""
        return "sha256:" + hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """What is kept."""
        rows = [[item.name, item.size, item.written] for item in self.items]
        return json.dumps({"single": self.single, "items": rows}, indent=1)

    @classmethod
    def read(cls, file: Path) -> Listing | None:
        """The kept one; None where none was kept, or not by this release."""
        if not file.is_file():
            return None
        try:
            value = json.loads(file.read_text())
            return cls(value["single"], tuple(Item(*row) for row in value["items"]))
        except (ValueError, TypeError, KeyError):
            _log.warning("%s cannot be read: asking the store anew", file)
            return None

    def missing(self, files: Path) -> list[Item]:
        """What is not there in full."""
        return [item for item in self.items if not _complete(files / item.name, item.size)]

    def place(self, files: Path) -> Path:
        """What the URI stands for on this machine."""
        return files / self.items[0].name if self.single else files


def _complete(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size
