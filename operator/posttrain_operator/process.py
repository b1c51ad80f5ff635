"""What CPython's defaults cost a process like this one: thousands of objects read at once, a thousand connections.

Called once, by `__main__`. Measured: docs/benchmarks-operator.md.
"""

from __future__ import annotations

import gc
from asyncio import sslproto

TLS_BUFFER = 32 * 1024
"""Bytes that each TLS connection reads into; a record has at most 16 KiB. asyncio's own 256 KiB were most of the memory
with a thousand pods that report."""
_ALLOCATIONS, _YOUNG, _MIDDLE = 50_000, 20, 100


def tune() -> None:
    """Collects garbage less often, and never looks again at what is there already: parsing lists of Kubernetes objects
    makes next to no cycles, and took a quarter longer."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS, _YOUNG, _MIDDLE)
    sslproto.SSLProtocol.max_size = TLS_BUFFER
