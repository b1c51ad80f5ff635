"""The benchmark's cluster: etcd, API server, the chart's rights, namespaces by what the jobs in them are for.

`fleet` has the jobs that run, played by the status runner; `one-by-one` lives of one job at a time; `at-once` many at
once; `archive` what has finished or waits. Made by `operator_bench`, used by its phases.
"""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import operator_objects as objects
from benchmarks.operator_access import access, install, namespace, operator_kubeconfig
from benchmarks.operator_lives import Hands
from benchmarks.operator_process import PREFIX, Operator, end, environment, start
from benchmarks.operator_seen import Seen
from devcluster.testing import Cluster
from posttrain_api import names

_WRITES = frozenset({"POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION"})
_NOT_OURS = frozenset({"leases", "tokenreviews", "subjectaccessreviews", "serviceaccounts", "endpointslices"})
"""Written all the time, whatever the operator does with jobs: leader election, and the API server's own."""


class World:
    """Everything but the operator. Make it before the event loop runs, `open` inside it."""

    fleet, probe, rush, archive = "fleet", "one-by-one", "at-once", "archive"

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        install(cluster)
        for name in (self.fleet, self.probe, self.rush, self.archive):
            namespace(cluster, name, objects.claim("runs"))
        self.kubeconfig = operator_kubeconfig(cluster, folder)
        self.pids = components(int(str(cluster.spec.ready()["pid"])))
        self._numbers = itertools.count()
        self._runner: subprocess.Popen[bytes] | None = None

    async def open(self) -> World:
        """Clients and the status runner."""
        self.client = access(self.cluster.spec.root)
        self.http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        self.seen = await Seen(self.client, self.probe).start()
        self.rushed = await Seen(self.client, self.rush).start()
        command = [sys.executable, "-m", "benchmarks.operator_runner", str(self.cluster.spec.root), self.fleet]
        self._runner = start(command, self.folder / "runner.log", environment())
        return self

    async def close(self) -> None:
        if self._runner:
            end(self._runner)
        await self.seen.stop()
        await self.rushed.stop()
        await self.http.close()
        await self.client.close()

    def hands(self, name: str) -> Hands:
        """In `one-by-one` or `at-once`."""
        return Hands(self.client, self.seen if name == self.probe else self.rushed, name)

    def unique(self) -> str:
        """A prefix for names that nothing had before."""
        return f"j{next(self._numbers)}"

    async def running(self, operator: Operator) -> int:
        """How many jobs of the fleet run, as the operator's own metrics say."""
        values = (await operator.metrics(self.http)).values
        wanted = {("job_namespace", self.fleet), ("state", "Running")}
        return int(
            sum(value for (name, labels), value in values.items() if name == PREFIX + "jobs" and wanted <= labels)
        )

    async def clear(self, hands: Hands) -> None:
        """Deletes all jobs of a namespace and waits until the garbage collector has taken what they owned."""
        await self.client.delete(hands.jobs, {"propagationPolicy": "Background"})
        end_by = time.monotonic() + 300
        for path in (hands.jobs, hands.children, hands.maps):
            query = {"labelSelector": names.LABEL_JOB_NAME} if path == hands.maps else {}
            while (await self.client.get(path, limit="1", **query))["items"]:
                if time.monotonic() > end_by:
                    raise TimeoutError(f"{path} was not empty in 300 s after its jobs were deleted")
                await asyncio.sleep(0.5)

    async def writes(self) -> int:
        """Successful writes to the API server so far, of anything that has to do with jobs."""
        return sum((await self.counted()).values())

    async def counted(self) -> Counter[str]:
        """The same by verb and resource, from the API server's own metrics."""
        text = (await self.client.request("GET", "/metrics"))["text"]
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            if family.name != "apiserver_request":
                continue
            for sample in family.samples:
                labels = sample.labels
                if labels["verb"] in _WRITES and labels["resource"] not in _NOT_OURS and labels["code"][0] == "2":
                    found[f"{labels['verb']} {labels['resource']}/{labels['subresource']}"] += int(sample.value)
        return found

    async def idle_requests(self, operator: Operator, seconds: float = 5.0) -> dict[str, float]:
        """Requests a second by verb while nothing happens: renewals of the Lease."""
        before = (await operator.metrics(self.http)).requests()
        await asyncio.sleep(seconds)
        after = (await operator.metrics(self.http)).requests()
        return {verb: (count - before.get(verb, 0)) / seconds for verb, count in after.items()}


def components(supervisor: int) -> dict[str, int]:
    """The control plane's processes by name."""
    found: dict[str, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = stat.read_text().rpartition(")")
            if int(rest.split()[1]) == supervisor:
                found[Path(f"/proc/{stat.parent.name}/cmdline").read_text().split("\0")[0].rpartition("/")[2]] = int(
                    head.split()[0]
                )
        except (OSError, ValueError):
            continue  # it ended while we looked
    return found
