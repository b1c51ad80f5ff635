"""The demo's cluster: two nodes that offer GPUs, the operator from its chart, a claim with the data.

Everything here is what a platform team does once. It uses the real kubectl and helm; only the data is written past
Kubernetes, straight into the volume's folder, as one would copy files to an NFS share.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from demo import arithmetic
from demo.settings import CHART, CLAIM, ENVIRONMENTS, EXAMPLE, IMAGES, OPERATOR_NAMESPACE, RELEASE, DemoError, Settings
from devcluster import binaries, launcher
from devcluster.state import ClusterSpec
from devcluster.testing import Cluster

NODES, GPUS_PER_NODE = 2, 8


def build(say: Callable[[str], None]) -> None:
    """Compiles the Kubernetes components that are missing; minutes, the first time."""
    binaries.ensure(binaries.EVERYTHING, say)


def describe(settings: Settings) -> ClusterSpec:
    """What is started. DemoError where the environments that stand for the images are not there."""
    images: dict[str, dict[str, object]] = {}
    for name, folder in IMAGES.items():
        environment = ENVIRONMENTS / folder
        if not (environment / "bin" / "python").exists():
            raise DemoError(f"{environment} is missing: run `make images-local` (or `make demo`, which does it)")
        images[name] = {"env": str(environment)}
    return ClusterSpec("demo", str(settings.state), nodes=NODES, gpus_per_node=GPUS_PER_NODE, images=images)


def start(spec: ClusterSpec, say: Callable[[str], None]) -> Cluster:
    """Starts the cluster; one that an earlier demo left running is stopped first."""
    if launcher.stop(spec):
        say("stopped the cluster that an earlier demo kept")
    launcher.start(spec, say)
    return Cluster(spec)


def install(cluster: Cluster) -> None:
    """The operator, by helm, as on any cluster; trainer.allowCPU because no node here has a GPU, one replica because
    all nodes are one machine."""
    cluster.helm(
        *("upgrade", "--install", RELEASE, str(CHART), "--namespace", OPERATOR_NAMESPACE, "--create-namespace"),
        *("--set", "trainer.allowCPU=true", "--set", "replicas=1"),
    )
    cluster.kubectl(
        "rollout", "status", f"deployment/{RELEASE}", "-n", OPERATOR_NAMESPACE, "--timeout=120s", timeout=150
    )


def write_data(cluster: Cluster) -> Path:
    """Creates the claim and puts the sets into its volume; returns the volume's folder on this machine."""
    cluster.kubectl("apply", "-f", str(EXAMPLE / "00-storage.yaml"))
    folder = volume_folder(cluster)
    data = folder / "data"
    data.mkdir(exist_ok=True)
    sets = arithmetic.generate()
    for name, rows in vars(sets).items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def volume_folder(cluster: Cluster, claim: str = CLAIM, namespace: str = "default") -> Path:
    """The host folder behind a claim. DemoError where it is not bound within half a minute."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = cluster.get("pvc", claim, "-n", namespace)
        if found.get("status", {}).get("phase") == "Bound":
            volume = cluster.get("pv", found["spec"]["volumeName"])["spec"]
            return Path((volume.get("hostPath") or volume["local"])["path"])
        time.sleep(0.3)
    raise DemoError(f"the claim {claim} was not bound to a volume: see `kubectl describe pvc {claim}`")
