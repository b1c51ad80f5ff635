"""Applies the example and watches it as a user would (`kubectl apply`, `kubectl get ptj -w`), and says why it failed.

The verdict comes from the jobs' own status; nothing here looks into pods or files to find out whether it went well.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

from demo import show
from demo.settings import EXAMPLE, OPERATOR_NAMESPACE, RELEASE, TUNED, DemoError, Settings
from devcluster import binaries
from devcluster.testing import Cluster

METRICS = ("posttrain_step ", "posttrain_loss ", "posttrain_learning_rate ")


def run(cluster: Cluster, settings: Settings) -> None:
    """Applies the example's files and returns when every job is Succeeded. DemoError where one is not, or none ends."""
    files = [] if settings.whole else settings.files
    names = [f"examples/quickstart/{file}.yaml" for file in files] or ["examples/quickstart/"]
    show.block("$ kubectl apply" + "".join(f" -f {name}" for name in names))
    paths = [str(EXAMPLE / f"{file}.yaml") for file in files] or [str(EXAMPLE)]
    show.block(cluster.kubectl("apply", *(part for path in paths for part in ("-f", path))))
    show.block("$ kubectl get ptj -w")
    with _watch(cluster):
        states = _wait(cluster, settings)
    if any(state != "Succeeded" for state in states.values()):
        raise DemoError("not every job succeeded: " + ", ".join(f"{name} is {state}" for name, state in states.items()))


@contextlib.contextmanager
def _watch(cluster: Cluster) -> Iterator[None]:
    command = [str(binaries.binary("kubectl")), f"--kubeconfig={cluster.kubeconfig}", "get", "ptj", "-w"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=_copy, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            yield
            time.sleep(0.5)  # the last change is on its way to the screen
        finally:
            process.terminate()
            reader.join(timeout=5)


def _copy(lines: IO[str]) -> None:
    for line in lines:
        show.block(line)


def _wait(cluster: Cluster, settings: Settings) -> dict[str, str]:
    """The jobs' final states by name. DemoError where they take too long."""
    deadline, scraped = time.monotonic() + settings.limit_seconds, False
    while time.monotonic() < deadline:
        found = {item["metadata"]["name"]: item.get("status", {}) for item in cluster.get("ptj")["items"]}
        states = {name: str(found.get(name, {}).get("state", "Pending")) for name in settings.jobs}
        if all(state in ("Succeeded", "Failed") for state in states.values()):
            return states
        scraped = scraped or _scrape(cluster, found.get(TUNED, {}))
        time.sleep(1)
    raise DemoError(f"the jobs did not end within {settings.limit_seconds} s")


def _scrape(cluster: Cluster, status: dict[str, Any]) -> bool:
    """Shows once what Prometheus would see of a running job; False while there is nothing to show yet."""
    if not status.get("progress", {}).get("step"):
        return False
    path = f"/api/v1/namespaces/default/pods/{TUNED}-master-0:9464/proxy/metrics"
    lines = [
        line for line in cluster.kubectl("get", "--raw", path, check=False).splitlines() if line.startswith(METRICS)
    ]
    if lines:
        show.block("--- what Prometheus sees of it now: " + ", ".join(lines))
    return bool(lines)


def explain_failure(cluster: Cluster) -> None:
    """Everything that a person needs to see why: the jobs, their events, the ends of the logs."""
    operator = ("logs", "-n", OPERATOR_NAMESPACE, f"deployment/{RELEASE}", "--tail=30")
    questions = [
        ("get", "ptj", "-o", "wide"),
        ("describe", "ptj"),
        ("get", "pods", "-A", "-o", "wide"),
        ("get", "events", "--sort-by=.lastTimestamp"),
        ("logs", "-l", "app.kubernetes.io/managed-by=posttrain-operator", "--tail=30", "--prefix"),
        operator,
    ]
    for question in questions:
        show.line()
        show.line("$ kubectl " + " ".join(question), show.BOLD)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one answer that does not come must not hide the others
            show.block("\n".join(cluster.kubectl(*question, check=False, timeout=20).splitlines()[-80:]))
