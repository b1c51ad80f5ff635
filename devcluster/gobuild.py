"""One `go build` with a sign of life: a bar on a terminal, a line now and then elsewhere.

Called by `binaries`. A first build of the API server compiles well over a thousand packages and takes minutes, and
`go build` itself is silent meanwhile. `-v` names each package as it is compiled, so the share that is done can be told.
Packages that are compiled already are not named: then the build is simply over sooner.
"""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from devcluster.errors import DevclusterError

LINE_SECONDS = 20.0
"""Without a terminal: at most one line in so many seconds."""


@dataclass(frozen=True)
class Target:
    """What is built: the component's name, its main package, and the file it becomes."""

    name: str
    package: str
    path: Path
    ldflags: str


def build(go: str, module: Path, target: Target, say: Callable[[str], None]) -> None:
    """Compiles `target` in `module`. DevclusterError with the end of the compiler's output where it fails."""
    command = [go, "build", "-v", "-trimpath", "-ldflags", target.ldflags, "-o", str(target.path), target.package]
    # CGO_ENABLED=0: static binaries, no C compiler needed.
    environment = {**os.environ, "CGO_ENABLED": "0"}
    total = _packages(go, module, target.package, environment)
    with subprocess.Popen(command, cwd=module, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        tail: deque[str] = deque(_watched(process.stderr, target.name, total, say), maxlen=40)
    if process.returncode != 0:
        raise DevclusterError(f"building {target.name} ({target.package}) failed:\n{''.join(tail)[-3000:]}")


def _packages(go: str, module: Path, package: str, environment: dict[str, str]) -> int:
    """How many packages it is made of; a first call also fetches their sources."""
    listed = subprocess.run(
        [go, "list", "-deps", package], cwd=module, env=environment, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        raise DevclusterError(f"{package}: its sources cannot be fetched or read:\n{listed.stderr[-3000:]}")
    return len(listed.stdout.splitlines())


def _watched(lines: Iterable[str], name: str, total: int, say: Callable[[str], None]) -> Iterator[str]:
    if sys.stderr.isatty():
        yield from tqdm(lines, desc=f"  {name}", total=total, unit="package", leave=False, dynamic_ncols=True)
        return
    said = time.monotonic()
    for done, line in enumerate(lines, 1):
        if time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            say(f"    {name}: {done} of at most {total} packages")
        yield line
