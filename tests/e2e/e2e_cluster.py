"""What a cluster of the end-to-end tests is made of: the local images, and the operator by its chart."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from e2e_kit import OPERATOR_NAMESPACE, RELEASE

from devcluster.testing import Cluster

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".build" / "envs"
IMAGES = {"posttrain-operator:0.1.0": "operator", "posttrain-trainer:0.1.0": "trainer"}


def images() -> dict[str, dict[str, object]]:
    """The environments that stand for the images; the tests are skipped where they are not built."""
    for folder in IMAGES.values():
        if not (ENVIRONMENTS / folder / "bin" / "python").exists():
            pytest.skip(f"{ENVIRONMENTS / folder} is missing: run `make images-local`", allow_module_level=True)
    return {name: {"env": str(ENVIRONMENTS / folder)} for name, folder in IMAGES.items()}


def install(cluster: Cluster, *settings: str) -> None:
    """Installs or changes the operator, as helm does it anywhere."""
    pairs = [part for setting in ("trainer.allowCPU=true", *settings) for part in ("--set", setting)]
    chart = str(ROOT / "helm" / "posttrain-operator")
    cluster.helm("upgrade", "--install", RELEASE, chart, "-n", OPERATOR_NAMESPACE, "--create-namespace", *pairs)
    cluster.kubectl(
        "rollout", "status", f"deployment/{RELEASE}", "-n", OPERATOR_NAMESPACE, "--timeout=120s", timeout=150
    )
    deadline = time.monotonic() + 90
    while not _a_present_pod_leads(cluster):
        assert time.monotonic() < deadline, "no pod of the present revision leads"
        time.sleep(0.5)


def _a_present_pod_leads(cluster: Cluster) -> bool:
    """Pods that stand by are ready: the rollout is over before the last one of the former revision has handed over."""
    path = "-o=jsonpath={.spec.holderIdentity}"
    holder = cluster.kubectl("get", "lease", RELEASE, "-n", OPERATOR_NAMESPACE, path, check=False)
    found = cluster.get("pods", "-l", "app.kubernetes.io/name=posttrain-operator", "-n", OPERATOR_NAMESPACE)
    present = [pod for pod in found["items"] if "deletionTimestamp" not in pod["metadata"]]
    leader = next((pod for pod in present if pod["metadata"]["name"] == holder.partition("_")[0]), None)
    conditions = (leader or {}).get("status", {}).get("conditions") or ()
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
