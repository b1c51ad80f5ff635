"""Ways to the benchmark's API server: an administrator's client, and the operator's own kubeconfig.

The rights in that kubeconfig are the chart's, word for word: its service account's token, after `helm install`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from devcluster import binaries
from devcluster.api import Client
from devcluster.certificates import KeyPair
from devcluster.state import load_spec
from devcluster.testing import Cluster

ROOT = Path(__file__).parents[1]
CHART = ROOT / "helm" / "posttrain-operator"
SYSTEM, ACCOUNT = "posttrain-system", "posttrain-operator"
STATUS_SECRET = "posttrain-operator-status"


def access(state: Path) -> Client:
    """An administrator's client for the cluster in a state folder; made inside a running loop."""
    spec = load_spec(state)
    pair = KeyPair(spec.pki / "admin-outside.crt", spec.pki / "admin-outside.key")
    return Client(str(spec.ready()["api"]), spec.pki / "ca.crt", pair)


def install(cluster: Cluster) -> None:
    """The operator's namespace, both kinds, and the chart's accounts and rights."""
    cluster.kubectl("create", "namespace", SYSTEM)
    cluster.helm("install", "posttrain-operator", str(CHART), "--namespace", SYSTEM)
    binaries.ensure(["training-operator"])
    crd = binaries.manifests("training-operator") / "crds" / "kubeflow.org_pytorchjobs.yaml"
    cluster.kubectl("apply", "--server-side", "-f", str(crd))
    for name in ("posttrainingjobs.posttrain.dev", "pytorchjobs.kubeflow.org"):
        until(lambda name=name: _established(cluster, name), f"{name} to be established", 60)


def _established(cluster: Cluster, name: str) -> bool:
    path = "-o=jsonpath={.status.conditions[?(@.type=='Established')].status}"
    return cluster.kubectl("get", "crd", name, path, check=False).strip() == "True"


def namespace(cluster: Cluster, name: str, claim: dict[str, Any]) -> None:
    """A namespace with a claim, once pods can be made in it."""
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("create", "-n", name, "-f", "-", stdin=json.dumps(claim))
    ready = ("get", "serviceaccount", "default", "-n", name, "--ignore-not-found", "-o", "name")
    until(lambda: cluster.kubectl(*ready).strip(), f"the service account of {name}", 60)


def operator_kubeconfig(cluster: Cluster, folder: Path) -> Path:
    """A kubeconfig with a token of the operator's own service account."""
    admin = json.loads(cluster.kubectl("config", "view", "--raw", "-o", "json"))
    token = cluster.kubectl("create", "token", ACCOUNT, "-n", SYSTEM, "--duration=6h").strip()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": admin["clusters"][0]["cluster"]}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path = folder / "operator.kubeconfig"
    path.write_text(json.dumps(config))
    path.chmod(0o600)
    return path


def until(check: Callable[[], Any], what: str, seconds: float) -> Any:
    """Polls until `check` returns something true; TimeoutError with `what` otherwise."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := check():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"waited {seconds:.0f} s for {what}")
