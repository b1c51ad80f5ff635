"""One full cluster for all of this folder's cluster tests; each test works in a namespace of its own."""

import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from devcluster.images import TOOLS
from devcluster.testing import Cluster, full_cluster

Object = dict[str, Any]


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    with full_cluster(nodes=2, gpus_per_node=8) as cluster:
        yield cluster


@dataclass(frozen=True)
class Space:
    """A namespace of the shared cluster."""

    cluster: Cluster
    name: str

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return self.cluster.kubectl("-n", self.name, *arguments, **options)

    def apply(self, *objects: Object) -> None:
        for each in objects:
            each.setdefault("apiVersion", "v1")
            each["metadata"]["namespace"] = self.name
        self.cluster.apply(*objects)

    def run(self, name: str, script: str, spec: Object | None = None, **container: Any) -> None:
        """A pod with one container `main` of the tools image that runs this shell script."""
        main = {"name": "main", "image": TOOLS, "command": ["sh", "-c", script], **container}
        body = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, **(spec or {}), "containers": [main]}
        self.apply({"kind": "Pod", "metadata": {"name": name}, "spec": body})

    def pod(self, name: str) -> Object:
        found = self.cluster.read.find("pod", name, self.name)
        assert found is not None, f"there is no pod {name} in {self.name}"
        return found

    def state(self, name: str) -> Object:
        """The state of the first container, {} while there is none."""
        found = self.pod(name)["status"].get("containerStatuses") or [{}]
        return dict(found[0].get("state") or {})

    def wait(self, what: Callable[[], Any], seconds: float = 30) -> Any:
        """Ask until the answer is true, and return it."""
        deadline = time.monotonic() + seconds
        while not (answer := what()):
            assert time.monotonic() < deadline, self.kubectl("get", "pods,events", "-o", "wide")
            time.sleep(0.1)
        return answer

    def phase(self, name: str, *phases: str) -> str:
        """Wait until the pod is in one of these phases."""
        return str(self.wait(lambda: (found := self.pod(name)["status"].get("phase")) in phases and found))

    def finish(self, name: str) -> str:
        """Wait for the pod's end and return its log."""
        self.phase(name, "Succeeded", "Failed")
        return self.kubectl("logs", name)

    def events(self, name: str) -> list[str]:
        """reason: message of the pod's events."""
        found = self.cluster.get("events", "-n", self.name, f"--field-selector=involvedObject.name={name}")
        return [f"{each['reason']}: {each['message']}" for each in found["items"]]


@pytest.fixture
def space(shared_cluster: Cluster) -> Iterator[Space]:
    name = f"t-{uuid.uuid4().hex[:8]}"
    shared_cluster.kubectl("create", "namespace", name)
    while shared_cluster.read.find("serviceaccount", "default", name) is None:
        time.sleep(0.05)
    yield Space(shared_cluster, name)
    shared_cluster.kubectl("delete", "namespace", name, "--wait=false")
