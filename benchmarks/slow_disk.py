"""A storage that is slow for real processes, without a mount: `slow_storage.c`, loaded before libc. Used by
`slow_storage`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("slow_storage.c")
PROBE_BYTES = 4 << 20


@dataclass(frozen=True)
class Storage:
    """The folder of one measurement. `rate`: bytes per second; None: as fast as the machine."""

    folder: Path
    library: Path
    rate: float | None = None

    def environment(self, slow: Path) -> dict[str, str]:
        """For processes that shall find the folder `slow` so slow."""
        if self.rate is None:
            return {}
        clock = self.folder / "clock"
        clock.write_bytes(bytes(8))
        own = {"SLOW_ROOT": str(slow), "SLOW_CLOCK": str(clock), "SLOW_BYTES_PER_SECOND": str(self.rate)}
        return {"LD_PRELOAD": str(self.library), **own}


def note(text: str) -> None:
    """Progress, on standard error."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def compiled(folder: Path) -> Path:
    """The library that slows. SystemExit where it cannot be made."""
    library = folder / "slow_storage.so"
    if shutil.which("cc") is None:
        raise SystemExit("slow_storage: no C compiler `cc` on the PATH (Debian, Ubuntu: apt install gcc libc6-dev)")
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"slow_storage: cc cannot compile {SOURCE.name}:\n{made.stderr}")
    return library


def check(storage: Storage) -> None:
    """Both C++'s writes (torch.save) and Python's wait, and only in the slow folder. SystemExit where not."""
    slow, fast = storage.folder / "probe" / "slow", storage.folder / "probe" / "fast"
    for folder in (slow, fast):
        folder.mkdir(parents=True)
    environment = {**os.environ, **replace(storage, rate=PROBE_BYTES).environment(slow)}
    command = [sys.executable, "-c", f"import {__spec__.name} as it; it.probe({str(slow)!r}, {str(fast)!r})"]
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    waited, free = json.loads(found)
    told = f"a second's worth of bytes takes {waited} s, elsewhere {free} s ({', '.join(WRITERS)})"
    if min(waited) < 0.99 or max(free) > 0.9:
        raise SystemExit(f"slow_storage: writes are not slowed as they should be: {told}")
    note(told)


def probe(*folders: str) -> None:
    """In a process of its own: seconds of each writer in each folder, as JSON."""
    print(json.dumps([[_timed(write, Path(folder) / name) for name, write in WRITERS.items()] for folder in folders]))


def _timed(write: Callable[[Path], object], path: Path) -> float:
    began = time.monotonic()
    write(path)
    return round(time.monotonic() - began, 3)


def _by_call(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        os.write(file.fileno(), bytes(PROBE_BYTES))


def _by_torch(path: Path) -> None:
    torch.save(torch.zeros(PROBE_BYTES, dtype=torch.uint8), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "write": _by_call,
    "file": lambda path: path.write_bytes(bytes(PROBE_BYTES)),
    "torch.save": _by_torch,
}
