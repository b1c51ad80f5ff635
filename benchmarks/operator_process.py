"""The operator as the chart runs it, as a process of its own, and what can be measured of any process from outside."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.operator_access import STATUS_SECRET, SYSTEM
from devcluster.processes import die_with_parent

PREFIX = "posttraining_"
WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_TICKS = os.sysconf("SC_CLK_TCK")
_OWN = ("PATH", "HOME", "LANG")
_ROOT = Path(__file__).parents[1]


def free_port() -> int:
    """A port that was free on 127.0.0.1 a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """What children get of our environment: little, and the way to this repository's packages."""
    path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, **{name: os.environ[name] for name in _OWN if name in os.environ}}


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def memory(pid: int) -> tuple[float, float]:
    """(resident now, at most so far) in MiB."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(lines["VmRSS"].split()[0]) / 1024, int(lines["VmHWM"].split()[0]) / 1024


def start(command: list[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A child that Ctrl-C does not reach and that dies with us; both streams go to `log`."""
    with log.open("ab") as sink:
        return subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            cwd=log.parent,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def end(process: subprocess.Popen[bytes], seconds: float = 30) -> int:
    """TERM, then KILL; the exit code."""
    if process.poll() is None:
        process.terminate()
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


@dataclass(frozen=True)
class Metrics:
    """One scrape of the operator: (name, labels) -> value."""

    values: Mapping[tuple[str, frozenset[tuple[str, str]]], float]

    def requests(self) -> dict[str, float]:
        """API requests by verb."""
        found: dict[str, float] = {}
        for (name, labels), value in self.values.items():
            if name == PREFIX + "api_requests_total":
                method = dict(labels)["method"]
                found[method] = found.get(method, 0) + value
        return found

    def writes(self) -> float:
        return sum(count for method, count in self.requests().items() if method in WRITES)

    def buckets(self, name: str) -> dict[float, float]:
        """Cumulative counts of a histogram by upper bound."""
        bucket = f"{PREFIX}{name}_bucket"
        return {float(dict(labels)["le"]): value for (found, labels), value in self.values.items() if found == bucket}

    def total(self, name: str) -> float:
        """The sum of a counter over its labels."""
        return sum(value for (found, _), value in self.values.items() if found == PREFIX + name)


def quantile(before: Mapping[float, float], after: Mapping[float, float], share: float) -> float:
    """The upper bound of the bucket in which a quantile lies, of what was counted between two scrapes."""
    counts = {bound: count - before.get(bound, 0) for bound, count in sorted(after.items())}
    wanted = share * max(counts.values(), default=0)
    return next((bound for bound, count in counts.items() if count >= wanted), float("nan"))


def _says(log: Path, text: str) -> bool:
    return text in log.read_text(errors="replace")


class Operator:
    """One operator process. `ready_seconds`: from its start until it was ready, once `ready` has returned."""

    def __init__(self, kubeconfig: Path, folder: Path, environ: Mapping[str, str] | None = None) -> None:
        self.port, status = free_port(), free_port()
        self.log = folder / f"operator-{time.monotonic_ns()}.log"
        settings = {
            "TRAINER_IMAGE": "trainer:bench",
            "NAMESPACE": SYSTEM,
            "STATUS_URL": f"https://localhost:{status}",
            "STATUS_PORT": str(status),
            "STATUS_SECRET": STATUS_SECRET,
            "METRICS_PORT": str(self.port),
            **(environ or {}),
        }
        env = {f"POSTTRAIN_OPERATOR_{name}": value for name, value in settings.items()}
        self.status_url = settings["STATUS_URL"]
        self.ready_seconds = 0.0
        self._started = time.monotonic()
        command = [sys.executable, "-m", "posttrain_operator"]
        self.process = start(command, self.log, {**environment(), **env, "KUBECONFIG": str(kubeconfig)})

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ready(self, seconds: float = 300) -> Operator:
        """Waits until it leads and has read all lists (its log says so: a standby is ready too). RuntimeError with the
        log's end where it died, TimeoutError where it never is."""
        while time.monotonic() - self._started < seconds:
            self.must_run()
            if await asyncio.to_thread(_says, self.log, "ready after"):
                self.ready_seconds = time.monotonic() - self._started
                return self
            await asyncio.sleep(0.05)
        raise TimeoutError(f"the operator was not ready in {seconds:.0f} s; its log: {self.log}")

    async def metrics(self, http: aiohttp.ClientSession) -> Metrics:
        async with http.get(f"http://127.0.0.1:{self.port}/metrics") as answer:
            text = await answer.text()
        families = text_string_to_metric_families(text)
        samples: list[Any] = [sample for family in families for sample in family.samples]
        return Metrics({(each.name, frozenset(each.labels.items())): each.value for each in samples})

    def must_run(self) -> None:
        """RuntimeError with the end of its log where it is gone."""
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"the operator ended with {self.process.returncode}; its last lines:\n{tail}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its exit code."""
        if self.process.poll() is None and number != signal.SIGTERM:
            self.process.send_signal(number)
            return self.process.wait(30)
        return end(self.process)
