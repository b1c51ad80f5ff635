"""What the end-to-end tests share: small jobs, data on claims, waiting with a reason when it takes too long.

A `Bench` is one namespace of the shared cluster with a claim `runs`. Jobs are tiny: each file of tests applies many at
once and each test waits for its own, so that start-up times overlap.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.testing import Cluster

OPERATOR_NAMESPACE = "posttrain-system"
RELEASE = "posttrain-operator"
END_SECONDS = 300

Manifest = dict[str, Any]

SHAPE = {"family": "Llama", "vocabSize": 261, "hiddenSize": 32, "intermediateSize": 64, "layers": 2, "heads": 2}
TINY: Manifest = {
    "stage": "Pretrain",
    "model": {"scratch": {**SHAPE, "maxLength": 64}},
    "data": {"train": [{"uri": "pvc://runs/data/text.jsonl"}], "maxLength": 64},
    "training": {"maxSteps": 4, "batchSize": 8, "learningRate": 1e-3},
    "storage": {"claimName": "runs"},
    "resources": {"gpusPerNode": 1, "cpu": "500m", "memory": "2Gi", "sharedMemory": "64Mi"},
    "runPolicy": {"terminationGracePeriodSeconds": 20},
}
TINY_SFT: Manifest = {
    **TINY,
    "stage": "SFT",
    "model": {"uri": "pvc://runs/models/good"},
    "data": {"train": [{"uri": "pvc://runs/data/pairs.jsonl"}], "maxLength": 64},
    "lora": {"rank": 4},
}
TEXTS = [{"text": f"{a}+{b}={a + b}"} for a in range(20) for b in range(10)]
PAIRS = [{"prompt": f"What is {a}+{b}?", "completion": f" {a + b}"} for a in range(20) for b in range(10)]


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Manifest:
    """`base` with `changes` laid over it, block by block; None removes a field."""
    result = copy.deepcopy(dict(base))
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def job(name: str, base: Mapping[str, Any] = TINY, **changes: Any) -> Manifest:
    """A manifest: `base` with changes to spec's blocks."""
    api = {"apiVersion": "posttrain.dev/v1alpha1", "kind": "PostTrainingJob"}
    return {**api, "metadata": {"name": name}, "spec": merged(base, changes)}


@dataclass(frozen=True)
class Bench:
    """One namespace with the claim `runs`."""

    cluster: Cluster
    namespace: str

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """kubectl in the bench's namespace."""
        return self.cluster.kubectl("-n", self.namespace, *arguments, stdin=stdin, check=check)

    def apply(self, *manifests: Manifest) -> str:
        """kubectl apply, as a user does."""
        return self.kubectl("apply", "-f", "-", stdin="\n---\n".join(json.dumps(each) for each in manifests))

    def refused(self, manifest: Manifest) -> str:
        """The API server's words on a manifest that it must refuse."""
        said = self.kubectl("apply", "-f", "-", stdin=json.dumps(manifest), check=False)
        assert self.find("ptj", manifest["metadata"]["name"]) is None, f"was accepted: {said}"
        return said

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """One object."""
        found = self.find(kind, name)
        assert found is not None, f"there is no {kind} {name} in {self.namespace}"
        return found

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        """One object, None where it is not there."""
        return self.cluster.read.find(kind, name, self.namespace)

    def items(self, kind: str, *selection: str) -> list[dict[str, Any]]:
        """All objects of a kind."""
        return list(json.loads(self.kubectl("get", kind, *selection, "-o", "json"))["items"])

    def pods(self, name: str) -> list[dict[str, Any]]:
        """A job's pods."""
        return self.cluster.read.items("pod", self.namespace, f"posttrain.dev/job-name={name}")

    def status(self, name: str) -> dict[str, Any]:
        """A job's status, empty before the first visit."""
        return dict((self.find("ptj", name) or {}).get("status") or {})

    def until(self, name: str, what: Callable[[dict[str, Any]], Any], seconds: float = END_SECONDS) -> dict[str, Any]:
        """Waits until the job's status satisfies `what`; that status. Fails with all that is known if it never does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.status(name)
            if what(status):
                return status
            if status.get("state") in ("Succeeded", "Failed"):
                break
            time.sleep(0.5)
        raise AssertionError(f"{name} did not get there within {seconds} s:\n{self.story(name)}")

    def finished(self, name: str, seconds: float = END_SECONDS) -> dict[str, Any]:
        """Waits for the end; the status."""
        return self.until(name, lambda status: status.get("state") in ("Succeeded", "Failed"), seconds)

    def succeeded(self, name: str, seconds: float = END_SECONDS) -> dict[str, Any]:
        """Waits for success; the status."""
        status = self.finished(name, seconds)
        assert status["state"] == "Succeeded", self.story(name)
        return status

    def story(self, name: str) -> str:
        """What is known about a job, for a failing test."""
        selection = ("-l", f"posttrain.dev/job-name={name}")
        return "\n".join(
            [
                json.dumps(self.status(name), indent=1),
                self.kubectl("get", "pods", *selection, "-o", "wide", check=False),
                self.kubectl("get", "events", check=False)[-3000:],
                self.kubectl("logs", *selection, "--tail=25", "--prefix", check=False)[-6000:],
                self.cluster.kubectl(
                    "logs", "-n", OPERATOR_NAMESPACE, f"deployment/{RELEASE}", "--tail=20", check=False
                ),
            ]
        )

    def claim(self, name: str, size_limit: str | None = None) -> None:
        """Creates a ReadWriteMany claim; `size_limit` gives it a volume of that size that can be full."""
        annotations = {"devcluster/size-limit": size_limit} if size_limit else {}
        spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
        metadata = {"name": name, "annotations": annotations}
        self.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})

    def volume(self, claim: str = "runs") -> Path:
        """The claim's folder on this machine, waited for."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            folder = self.cluster.ask("claims").get(f"{self.namespace}/{claim}")
            if folder:
                return Path(folder)
            time.sleep(0.2)
        raise AssertionError(f"claim {claim} was not bound:\n" + self.kubectl("describe", "pvc", claim))

    def rows(self, path: str, rows: Iterable[Mapping[str, Any] | str], claim: str = "runs") -> None:
        """Writes a JSONL file to a claim; a string is written as it is."""
        target = self.volume(claim) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))

    def run_folder(self, name: str, claim: str = "runs") -> Path:
        """The job's folder on its claim."""
        return self.volume(claim) / name / str(self.get("ptj", name)["metadata"]["uid"])

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """metrics.jsonl of a job."""
        return [json.loads(line) for line in (self.run_folder(name) / "metrics.jsonl").read_text().splitlines()]


def condition(status: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """One condition, empty where there is none."""
    return next((dict(each) for each in status.get("conditions", []) if each["type"] == kind), {})


def restarts(status: Mapping[str, Any]) -> int:
    """How often all pods were replaced; unset until the first time."""
    return int(status.get("restarts", {}).get("total", 0))


def stalled(reason: str) -> Callable[[dict[str, Any]], bool]:
    """For `until`: the job is Stalled for this reason."""
    return lambda status: (
        condition(status, "Stalled").get("status") == "True" and condition(status, "Stalled").get("reason") == reason
    )


def waiting(status: Mapping[str, Any]) -> bool:
    """For `until`: the job waits for another job."""
    found = condition(status, "Suspended")
    return found.get("status") == "True" and found.get("reason") == "WaitingForDependency"


def step(status: Mapping[str, Any]) -> int:
    """The step that the progress shows, 0 before there is any."""
    return int(status.get("progress", {}).get("step") or 0)
