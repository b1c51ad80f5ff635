"""Help for a name that is not there: the nearest names that are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

SHOWN = 5


def nearest_names(path: Path) -> str:
    """A sentence about the first missing part of `path`: what its folder has instead."""
    folder = path.parent
    name = path.name
    while not folder.exists() and folder != folder.parent:
        name = folder.name
        folder = folder.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"The folder {folder} cannot be listed: {error.strerror}."
    return names_sentence(str(folder), name, names)


def names_sentence(folder: str, name: str, names: Sequence[str]) -> str:
    """What `folder` has that is most like `name`."""
    close = difflib.get_close_matches(name, names, n=SHOWN, cutoff=0.4)
    if close:
        return f"The folder {folder} has {', '.join(close)}. Correct the path."
    listed = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return f"The folder {folder} has {listed or 'nothing in it'}. Correct the path."
