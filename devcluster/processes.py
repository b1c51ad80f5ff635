"""Child processes that cannot outlive us.

Every process of a cluster is started through here, from the main thread: the kernel sends the parent-death signal when
the *thread* that started the child ends, so a worker thread must never start one. SIGKILL of the supervisor therefore
ends etcd, the API server and all the rest at once, with no clean-up code involved.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the starting thread ends. Runs in the child between fork and exec."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


async def start(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> asyncio.subprocess.Process:
    """Start a component with both streams appended to `log`."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("processes are started from the main thread only, see the module's head")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:  # noqa: ASYNC230 - a local file, opened once
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=dict(os.environ if env is None else env),
            cwd=cwd,
            preexec_fn=die_with_parent,
        )


async def stop(process: asyncio.subprocess.Process, grace: float = 5.0) -> None:
    """TERM, then KILL after `grace` seconds; returns when the process is gone."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):  # it ended between the look and the signal
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), grace)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):  # as above
            process.kill()
        await process.wait()


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log file, for an error message."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"
