"""The real JobSet and Trainer v2 controllers, for clusters that are started with `--with trainjob`.

Called by the supervisor after the control plane is ready. Both run as local processes with their own webhooks as their
modules ship them; their certificates come from the cluster's authority instead of a cert-manager, so their own
management of certificates is off and `caBundle` is filled in here. As in a cluster they are reached by a Service, whose
EndpointSlice names the bridge's address.
"""

import asyncio
import base64
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from devcluster import binaries, containers, kubeflow, processes
from devcluster.api import ApiError, Client, Obj
from devcluster.certificates import Subject
from devcluster.controlplane import MASTERS, ControlPlane
from devcluster.errors import DevclusterError
from devcluster.state import BRIDGE_IP

log = logging.getLogger(__name__)
ADMISSION = "/apis/admissionregistration.k8s.io/v1"
PLURALS = {
    "MutatingWebhookConfiguration": "mutatingwebhookconfigurations",
    "ValidatingWebhookConfiguration": "validatingwebhookconfigurations",
}


@dataclass(frozen=True)
class Controller:
    """One of them: its binary, its Service, where it listens, and what its dry run looks like."""

    name: str
    namespace: str
    service: str
    webhook_port: int
    probe_port: int
    config: Obj
    probe: Obj
    plural: str

    @property
    def host(self) -> str:
        return f"{self.service}.{self.namespace}.svc"


JOBSET = Controller(
    name="jobset",
    namespace="jobset-system",
    service="jobset-webhook-service",
    webhook_port=29444,
    probe_port=8082,
    config={
        "apiVersion": "config.jobset.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "internalCertManagement": {"enable": False},
        "clientConnection": {"qps": 200, "burst": 300},
    },
    probe={"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "spec": {"replicatedJobs": []}},
    plural="jobsets",
)
TRAINER = Controller(
    name="trainer-controller-manager",
    namespace="kubeflow-system",
    service="kubeflow-trainer-controller-manager",
    webhook_port=29445,
    probe_port=8083,
    config={
        "apiVersion": "config.trainer.kubeflow.org/v1alpha1",
        "kind": "Configuration",
        "certManagement": {"enable": False},
        "clientConnection": {"qps": 200, "burst": 300},
    },
    probe={
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "spec": {"template": {"spec": {"replicatedJobs": []}}},
    },
    plural="trainingruntimes",
)


def crd_files() -> list[Path]:
    """The definitions of both, as their modules ship them."""
    jobset = binaries.manifests("jobset") / "crd" / "bases" / "jobset.x-k8s.io_jobsets.yaml"
    folder = binaries.manifests("trainer-controller-manager") / "crds"
    return [jobset, *sorted(folder.glob("trainer.kubeflow.org_*.yaml"))]


def _webhooks(controller: Controller, authority: bytes) -> list[tuple[str, Obj]]:
    """(path, object) of the shipped configurations, pointed at our Service and trusting our authority."""
    shipped = binaries.manifests(controller.name) / "webhook" / "manifests.yaml"
    found = []
    for document in yaml.safe_load_all(shipped.read_text()):
        document["metadata"]["name"] = f"{document['metadata']['name']}-{controller.name}"
        for hook in document["webhooks"]:
            path = hook["clientConfig"]["service"]["path"]
            service = {"name": controller.service, "namespace": controller.namespace, "path": path, "port": 443}
            hook["clientConfig"] = {"service": service, "caBundle": base64.b64encode(authority).decode()}
            if "pods" in hook["rules"][0]["resources"]:  # JobSet's own patch of its manifests
                mark = {"key": "jobset.sigs.k8s.io/jobset-name", "operator": "Exists"}
                hook["objectSelector"] = {"matchExpressions": [mark]}
        found.append((f"{ADMISSION}/{PLURALS[document['kind']]}/{document['metadata']['name']}", document))
    return found


async def _objects(plane: ControlPlane, admin: Client, controller: Controller) -> None:
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": controller.namespace}}
    await admin.apply(f"/api/v1/namespaces/{controller.namespace}", namespace)
    place = kubeflow.Place(controller.service, controller.namespace, controller.webhook_port)
    authority = plane.ca.cert_path.read_bytes()
    for path, body in [*kubeflow.service_objects(place), *_webhooks(controller, authority)]:
        await admin.apply(path, body)


def _serving(plane: ControlPlane, controller: Controller) -> Path:
    """A folder with the certificate, by the names that controllers look for."""
    pair = plane.ca.issue(f"{controller.name}-webhook", Subject(controller.host, (), (controller.host,)))
    folder = plane.spec.root / f"{controller.name}-certs"
    folder.mkdir(exist_ok=True)
    shutil.copy(pair.cert, folder / "tls.crt")
    shutil.copy(pair.key, folder / "tls.key")
    return folder


def _config(plane: ControlPlane, controller: Controller) -> Path:
    listening = {
        "webhook": {"port": controller.webhook_port},
        "metrics": {"bindAddress": "0"},
        "health": {"healthProbeBindAddress": f"{BRIDGE_IP}:{controller.probe_port}"},
        "leaderElection": {"leaderElect": False},
    }
    path = plane.spec.root / f"{controller.name}.yaml"
    path.write_text(json.dumps({**controller.config, **listening}))
    return path


def _command(plane: ControlPlane, controller: Controller) -> Sequence[str]:
    identity = plane.identity(controller.name, controller.name, MASTERS)
    kubeconfig = plane.kubeconfig(controller.name, identity)
    jail = kubeflow.jail(plane, binaries.binary(controller.name), _serving(plane, controller))
    return [
        *jail,
        str(binaries.binary(controller.name)),
        f"--kubeconfig={kubeconfig}",
        f"--config={_config(plane, controller)}",
        "--zap-log-level=info",
    ]


async def _until_serving(admin: Client, controller: Controller) -> None:
    """A dry-run create passes through the webhooks: proof that the API server trusts and reaches them."""
    version = controller.probe["apiVersion"]
    path = f"/apis/{version}/namespaces/default/{controller.plural}"
    error: ApiError | None = None
    for _ in range(200):
        try:
            await admin.request(
                "POST", path, {**controller.probe, "metadata": {"name": "probe"}}, params={"dryRun": "All"}
            )
            return
        except ApiError as refused:
            error = refused
            await asyncio.sleep(0.05)
    raise DevclusterError(f"the webhook of {controller.name} does not answer: {error}")


async def _start(plane: ControlPlane, admin: Client, controller: Controller) -> None:
    await _objects(plane, admin, controller)
    logfile = plane.spec.logs / f"{controller.name}.log"
    process = await processes.start(_command(plane, controller), logfile)
    plane.running[controller.name] = process
    await kubeflow.until_ready(process, controller.name, controller.probe_port, logfile, 60)
    await _until_serving(admin, controller)


async def start(plane: ControlPlane, admin: Client) -> None:
    """Start both and return when they take objects. Their definitions are there already."""
    containers.bwrap_path()
    await asyncio.gather(_start(plane, admin, JOBSET), _start(plane, admin, TRAINER))
