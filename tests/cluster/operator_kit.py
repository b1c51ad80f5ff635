"""The operator as a process of its own on a real API server: under the chart's rights, with its own token.

The tests play what a cluster has besides: the training-operator (PyTorchJob conditions) and the kubelet (pod states).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import operator_access
from devcluster import binaries
from devcluster.testing import Cluster

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "posttrain-operator"
SYSTEM = "posttrain-system"
ACCOUNT = "posttrain-operator"
LEASE = "posttrain-operator"
NODE = "node-a"
PROGRAM = ("-m", "posttrain_operator")
Object = dict[str, Any]


def prepare(cluster: Cluster) -> None:
    """The operator's namespace, CRDs of both kinds, and the chart's accounts and rights."""
    cluster.kubectl("create", "namespace", SYSTEM)
    cluster.helm("install", "posttrain-operator", str(CHART), "--namespace", SYSTEM)
    cluster.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
    node_ready(cluster, "True")
    binaries.ensure(["training-operator"])
    crd = binaries.manifests("training-operator") / "crds" / "kubeflow.org_pytorchjobs.yaml"
    cluster.kubectl("apply", "--server-side", "-f", str(crd))
    for name in ("posttrainingjobs.posttrain.dev", "pytorchjobs.kubeflow.org"):
        wait_for(lambda name=name: _established(cluster, name), f"{name} to be established")


def node_ready(cluster: Cluster, status: str) -> None:
    """The node of all pods that the tests make answers, or does not; nobody else looks after it."""
    ready = {"type": "Ready", "status": status, "lastTransitionTime": utc_now()}
    body = json.dumps({"status": {"conditions": [ready]}})
    cluster.kubectl("patch", "node", NODE, "--subresource=status", "--type=merge", "-p", body)


def utc_now() -> str:
    """As Kubernetes writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _established(cluster: Cluster, name: str) -> bool:
    path = "-o=jsonpath={.status.conditions[?(@.type=='Established')].status}"
    return cluster.kubectl("get", "crd", name, path, check=False).strip() == "True"


def wait_for(check: Callable[[], Any], what: str, timeout: float = 20) -> Any:
    """Polls until `check` returns something true; AssertionError with `what` otherwise."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if found := check():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {timeout} s for {what}")


def operator_kubeconfig(cluster: Cluster, folder: Path) -> Path:
    """A kubeconfig with a token of the operator's own service account."""
    path = operator_access.operator_kubeconfig(cluster, folder)
    Operator.cluster = cluster
    return path


class Operator:
    """One operator process. `log` is the file of its stderr. It leads at once, as if the lease of one before it had run
    out, unless `queues`: then it waits as it would in a cluster. `program`: what Python runs instead of it."""

    cluster: ClassVar[Cluster | None] = None

    def __init__(
        self, kubeconfig: Path, log: Path, queues: bool = False, program: Sequence[str] = PROGRAM, **environ: str
    ) -> None:
        self.log = log
        if self.cluster and not queues and "LEASE_NAME" not in environ:
            self.cluster.kubectl("delete", "lease", LEASE, "-n", SYSTEM, "--ignore-not-found")
        settings = {
            "TRAINER_IMAGE": "trainer:test",
            "NAMESPACE": SYSTEM,
            "TIME_SCALE": "0.1",
            "LOG_FORMAT": "text",
            "LOG_LEVEL": "debug",
            "METRICS_PORT": "0",
            "LEASE_SECONDS": "150",  # whatever else the tests' time does: a busy machine must cost no leader
        }
        env = {f"POSTTRAIN_OPERATOR_{name}": value for name, value in {**settings, **environ}.items()}
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [sys.executable, *program],
                env={**kept, **env, "KUBECONFIG": str(kubeconfig)},
                stderr=sink,
                stdout=sink,
                cwd=log.parent,
            )

    def ready(self, timeout: float = 30) -> Operator:
        wait_for(self._is_ready, f"the operator to be ready; its log: {self.log.read_text()[-3000:]}", timeout)
        return self

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        return "ready after" in self.log.read_text()

    def stop(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        """Sends the signal; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout)


@contextlib.contextmanager
def operator(cluster: Cluster, folder: Path, program: Sequence[str] = PROGRAM, **environ: str) -> Iterator[Operator]:
    """A ready operator, ended with the block."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"operator-{time.monotonic_ns()}.log"
    running = Operator(operator_kubeconfig(cluster, folder), log, program=program, **environ)
    try:
        yield running.ready()
    finally:
        if running.process.poll() is None:
            running.stop(signal.SIGKILL)


class World:
    """One namespace, and the hands of everybody but the operator."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace
        cluster.kubectl("create", "namespace", namespace)
        self.claim("runs")

    def claim(self, name: str) -> None:
        spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
        self.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec})

    def apply(self, *objects: Object) -> None:
        self.cluster.apply(
            *({**each, "metadata": {**each["metadata"], "namespace": self.namespace}} for each in objects)
        )

    def job(self, name: str, **spec: Any) -> None:
        """Applies a job; `spec` overrides fields of a small one."""
        self.jobs(name, **spec)

    def jobs(self, *names: str, **spec: Any) -> None:
        """Applies jobs that are alike, by one command."""
        base: Object = {
            "stage": "Pretrain",
            "model": {"scratch": {"family": "Llama", "vocabSize": 512, "hiddenSize": 64, "layers": 2, "heads": 4}},
            "data": {"train": [{"uri": "pvc://runs/corpus.jsonl"}]},
            "storage": {"claimName": "runs"},
            "resources": {"nodes": 2, "gpusPerNode": 0, "processesPerNode": 1},
        }
        merged = {key: value for key, value in {**base, **spec}.items() if value is not None}
        kind = {"apiVersion": "posttrain.dev/v1alpha1", "kind": "PostTrainingJob"}
        self.apply(*({**kind, "metadata": {"name": name}, "spec": merged} for name in names))

    def patch_job(self, name: str, spec: Object) -> None:
        self.kubectl("patch", "ptj", name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return self.cluster.kubectl("-n", self.namespace, *arguments, **options)

    def get(self, kind: str, name: str) -> Object | None:
        return self.cluster.read.find(kind, name, self.namespace)

    def status(self, name: str) -> Object:
        found = self.get("ptj", name)
        return (found or {}).get("status") or {}

    def until(self, name: str, timeout: float = 20, **wanted: Any) -> Object:
        """Waits until the job's status has these top-level values; returns it."""
        last: list[Object] = [{}]

        def check() -> Object | None:
            last[0] = self.status(name)
            return last[0] if all(last[0].get(key) == value for key, value in wanted.items()) else None

        try:
            return dict(wait_for(check, f"{name}: {wanted}", timeout))
        except AssertionError as error:
            raise AssertionError(f"{error}; last status: {json.dumps(last[0], indent=1)[-3000:]}") from None

    def child(self, name: str, timeout: float = 20) -> Object:
        return dict(wait_for(lambda: self.get("pytorchjob", name), f"PyTorchJob {name}", timeout))

    def struck(self, name: str, reason: str) -> Object:
        """Waits until the job's last failure is of this reason, whatever state it has come to since; its status."""
        wait_for(lambda: (self.status(name).get("failure") or {}).get("reason") == reason, f"{name}: {reason}")
        return self.status(name)

    def resumed(self, name: str, timeout: float = 20) -> None:
        """Waits for the end of the pause that the job's last restart has asked for, if any."""

        def over() -> bool:
            end = (self.status(name).get("restarts") or {}).get("notBefore", "")
            now = utc_now()
            return end <= now and not self.child(name)["spec"]["runPolicy"]["suspend"]

        wait_for(over, f"the pause of {name} to end", timeout)

    # The training-operator's hands.

    def pods(self, name: str) -> list[str]:
        """Makes the child's pods as the training-operator does; returns their names, the master's first."""
        child = self.child(name)
        replicas = child["spec"]["pytorchReplicaSpecs"].items()
        made = [
            self.pod(name, role.lower(), index) for role, replica in replicas for index in range(replica["replicas"])
        ]
        self.child_condition(name, "Running", "True")
        return made

    def pod(self, name: str, role: str, index: int) -> str:
        child = self.child(name)
        template = child["spec"]["pytorchReplicaSpecs"][role.capitalize()]["template"]
        pod_name = f"{name}-{role}-{index}"
        marks = {
            "training.kubeflow.org/job-name": name,
            "training.kubeflow.org/replica-type": role,
            "training.kubeflow.org/replica-index": str(index),
        }
        owner = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": name, "uid": child["metadata"]["uid"]}
        spec = {**template["spec"], "restartPolicy": "Never", "nodeName": NODE}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": pod_name,
                "namespace": self.namespace,
                "labels": {**template["metadata"]["labels"], **marks},
                "ownerReferences": [{**owner, "controller": True, "blockOwnerDeletion": True}],
            },
            "spec": spec,
        }
        self.kubectl("create", "-f", "-", stdin=json.dumps(pod))
        return pod_name

    def child_condition(self, name: str, kind: str, status: str) -> None:
        now = utc_now()
        entry = {
            "type": kind,
            "status": status,
            "reason": f"PyTorchJob{kind}",
            "message": f"PyTorchJob {name} is {kind.lower()}.",
            "lastTransitionTime": now,
            "lastUpdateTime": now,
        }
        body = {"status": {"conditions": [entry], "replicaStatuses": {}}}
        self.kubectl("patch", "pytorchjob", name, "--subresource=status", "--type=merge", "-p", json.dumps(body))

    # The kubelet's hands.

    def run_pod(self, pod: str) -> None:
        now = utc_now()
        running = {"state": {"running": {"startedAt": now}}, "ready": True, "started": True}
        self._pod_status(pod, "Running", running, ready=True)

    def end_pod(self, pod: str, code: int, message: str = "", reason: str = "") -> None:
        now = utc_now()
        ended = {"exitCode": code, "reason": reason or ("Completed" if code == 0 else "Error"), "message": message}
        state = {
            "state": {"terminated": {**ended, "finishedAt": now, "startedAt": now}},
            "ready": False,
            "started": False,
        }
        self._pod_status(pod, "Succeeded" if code == 0 else "Failed", state, ready=False)

    def _pod_status(self, pod: str, phase: str, container: Object, ready: bool) -> None:
        now = utc_now()
        status = {"name": "pytorch", "image": "trainer:test", "imageID": "", "restartCount": 0, **container}
        conditions = [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": now},
            {"type": "Ready", "status": "True" if ready else "False", "lastTransitionTime": now},
        ]
        body = {"status": {"phase": phase, "conditions": conditions, "containerStatuses": [status]}}
        self.kubectl("patch", "pod", pod, "--subresource=status", "--type=merge", "-p", json.dumps(body))

    def vanish(self, pod: str) -> None:
        """The kubelet's last word: the pod object is removed."""
        self.kubectl("delete", "pod", pod, "--grace-period=0", "--force", "--ignore-not-found", "--wait=false")


def uid_of(obj: Object | None) -> str:
    assert obj is not None
    return str(obj["metadata"]["uid"])


def decode(text: str) -> bytes:
    return base64.b64decode(text)
