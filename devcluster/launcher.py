"""Starts and stops supervisors: the part of `up` and `down` that runs in the caller's process.

Called by the command line and by `devcluster.testing`. It never touches a cluster's inside: it writes the spec, starts
the supervisor, shows its progress, and waits for ready.json or failed.txt.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from devcluster import binaries, processes, state
from devcluster.errors import DevclusterError

START_LIMIT = 300.0
STOP_LIMIT = 30.0
REPOSITORY = Path(__file__).parent.parent


def _supervise(spec: state.ClusterSpec, kept: bool) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "devcluster.supervisor", spec.state, *(["--kept"] if kept else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    with open(spec.logs / "supervisor.log", "ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE if kept else subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=env,
            cwd=spec.root,
            start_new_session=True,
        )


def _follow(path: Path, offset: int, say: Callable[[str], None]) -> int:
    if not path.exists():
        return offset
    with open(path) as handle:
        handle.seek(offset)
        for line in handle:
            say(line.rstrip())
        return handle.tell()


def _wait(spec: state.ClusterSpec, child: "subprocess.Popen[bytes]", say: Callable[[str], None]) -> None:
    deadline, offset = time.monotonic() + START_LIMIT, 0
    while time.monotonic() < deadline:
        offset = _follow(spec.progress_file, offset, say)
        if spec.ready_file.exists():
            return
        if child.poll() is not None:
            why = spec.failed_file.read_text() if spec.failed_file.exists() else ""
            log = spec.logs / "supervisor.log"
            raise DevclusterError(f"cluster {spec.name!r} did not start: {why or processes.tail(log)}\nsee {spec.logs}")
        time.sleep(0.05)
    raise DevclusterError(f"cluster {spec.name!r} was not ready in {START_LIMIT:.0f} s; see {spec.logs}")


def start(spec: state.ClusterSpec, say: Callable[[str], None], kept: bool = False) -> "subprocess.Popen[bytes]":
    """Build what is missing, start the supervisor, return when all is Ready.

    `kept`: the cluster ends when the returned process's stdin is closed, also by this process's death.
    Raises DevclusterError where it could not be started or is running already.
    """
    if state.running_pid(spec) is not None:
        raise DevclusterError(f"cluster {spec.name!r} already runs in {spec.state}; next: `down --name {spec.name}`")
    core = binaries.CONTROL_PLANE if spec.control_plane_only else binaries.EVERYTHING
    binaries.ensure([*core, *(name for extra in spec.extras for name in binaries.EXTRAS[extra])], say)
    sweep(spec)
    spec.root.mkdir(parents=True, exist_ok=True)
    spec.save()
    child = _supervise(spec, kept)
    try:
        _wait(spec, child, say)
    except BaseException:
        child.kill()
        child.wait()
        raise
    return child


def stop(spec: state.ClusterSpec) -> bool:
    """Stop a running supervisor (TERM, later KILL) and return whether there was one."""
    pid = state.running_pid(spec)
    if pid is None:
        return False
    with contextlib.suppress(ProcessLookupError):  # it may end by itself at this very moment
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_LIMIT
    while state.running_pid(spec) == pid:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return True


def sweep(spec: state.ClusterSpec) -> None:
    """Remove what an earlier run left in the state folder; only folders that hold a spec of ours are touched."""
    if (spec.root / "spec.json").exists():
        shutil.rmtree(spec.root)
