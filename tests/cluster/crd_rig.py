"""A real API server with the CRD, and the plain calls that the CRD's tests make."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes import client, config

from devcluster.testing import Cluster, control_plane

REPOSITORY = Path(__file__).parents[2]
CRD = REPOSITORY / "crds" / "posttrainingjobs.yaml"
JOBS = "/apis/posttrain.dev/v1alpha1/namespaces/default/posttrainingjobs"


@dataclass(frozen=True)
class Answer:
    """Status code, and the object or the message."""

    code: int
    body: Any
    text: str

    @property
    def ok(self) -> bool:
        return self.code < 300


@dataclass(frozen=True)
class Rig:
    """The API server, asked directly."""

    cluster: Cluster
    api: client.ApiClient

    def ask(self, verb: str, path: str, body: Any = None, content: str = "application/json", **query: str) -> Answer:
        """One request; never raises for the API server's own refusals."""
        request = self.api.param_serialize(
            verb,
            path,
            query_params=list(query.items()),
            header_params={"Content-Type": content, "Accept": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
        )
        response = self.api.call_api(*request)
        text = response.read().decode()
        return Answer(response.status, json.loads(text), text)

    def try_create(self, manifest: Mapping[str, Any]) -> Answer:
        """A dry run with strict field validation, as kubectl does."""
        return self.ask("POST", JOBS, dict(manifest), dryRun="All", fieldValidation="Strict")

    def create(self, manifest: Mapping[str, Any]) -> Answer:
        """A real create."""
        return self.ask("POST", JOBS, dict(manifest), fieldValidation="Strict")

    def merge(self, name: str, change: Any, status: bool = False) -> Answer:
        """A merge patch of the job or of its status."""
        path = f"{JOBS}/{name}/status" if status else f"{JOBS}/{name}"
        return self.ask("PATCH", path, change, "application/merge-patch+json")


@contextmanager
def crd_rig() -> Iterator[Rig]:
    """A control plane of its own with the CRD in place."""
    with control_plane() as cluster:
        cluster.kubectl("apply", "--server-side", "-f", str(CRD))
        _wait_until_served(cluster)
        yield Rig(cluster, config.new_client_from_config(str(cluster.kubeconfig)))


def _wait_until_served(cluster: Cluster) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if "items" in cluster.kubectl("get", "--raw", JOBS, check=False):
            return
        time.sleep(0.1)
    raise TimeoutError("the API server does not serve the new kind: " + json.dumps(JOBS))
