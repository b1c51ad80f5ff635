"""The real training-operator beside the control plane: webhook, certificate, template of the init container.

Called by the supervisor. The operator runs as a local process and is reached as in a cluster: its webhook is a Service
without a selector whose EndpointSlice names the bridge's address. It makes its own certificate in a Secret and waits
for the files; a kubelet would copy them, here we do.
"""

import asyncio
import base64
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from devcluster import binaries, containers, processes
from devcluster.api import ApiError, Client, Obj
from devcluster.controlplane import MASTERS, ControlPlane
from devcluster.errors import DevclusterError
from devcluster.state import BRIDGE_IP

log = logging.getLogger(__name__)
NAMESPACE = "kubeflow"
SERVICE = "training-operator"
SECRET = "training-operator-webhook-cert"
# The webhook listens on every address, so that no service may have this port; the other two keep to the bridge's.
WEBHOOK_PORT, METRICS_PORT, PROBE_PORT = 29443, 8080, 8081
SERVING = "/tmp/k8s-webhook-server/serving-certs"

# The stock template waits with nslookup, which ignores hosts files. It also asks for no security context, which a
# namespace under the "restricted" pod security standard refuses.
INIT_TEMPLATE = """\
- name: init-pytorch
  image: {{.InitContainerImage}}
  imagePullPolicy: IfNotPresent
  resources:
    limits: {cpu: 100m, memory: 20Mi}
    requests: {cpu: 50m, memory: 10Mi}
  securityContext:
    allowPrivilegeEscalation: false
    capabilities: {drop: [ALL]}
    runAsNonRoot: true
    seccompProfile: {type: RuntimeDefault}
  command: ['sh', '-c', 'for i in $(seq 3000); do getent hosts {{.MasterAddr}} && exit 0; sleep 0.1; done; exit 1']
"""


def crd_file() -> Path:
    """The PyTorchJob CRD, as the operator's module ships it."""
    return binaries.manifests("training-operator") / "crds" / "kubeflow.org_pytorchjobs.yaml"


@dataclass(frozen=True)
class Place:
    """A webhook's Service, and the port that its process listens on."""

    service: str
    namespace: str
    port: int


def service_objects(place: Place) -> list[tuple[str, Obj]]:
    """(path, object) of the Service without a selector and of its EndpointSlice."""
    meta = {"name": place.service, "namespace": place.namespace}
    ports = [{"name": "webhook-server", "port": 443, "targetPort": place.port, "protocol": "TCP"}]
    service = {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"ports": ports}}
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {**meta, "labels": {"kubernetes.io/service-name": place.service}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [BRIDGE_IP], "conditions": {"ready": True}}],
        "ports": [{"name": "webhook-server", "port": place.port, "protocol": "TCP"}],
    }
    slices = f"/apis/discovery.k8s.io/v1/namespaces/{place.namespace}/endpointslices/{place.service}"
    return [(f"/api/v1/namespaces/{place.namespace}/services/{place.service}", service), (slices, endpoints)]


def _webhook() -> tuple[str, Obj]:
    name = "validator.training-operator.kubeflow.org"
    client = {"service": {"name": SERVICE, "namespace": NAMESPACE, "path": "/validate-kubeflow-org-v1-pytorchjob"}}
    rule = {"apiGroups": ["kubeflow.org"], "apiVersions": ["v1"], "operations": ["CREATE", "UPDATE"]}
    hook = {
        "name": "validator.pytorchjob.training-operator.kubeflow.org",
        "admissionReviewVersions": ["v1"],
        "clientConfig": client,
        "failurePolicy": "Fail",
        "rules": [{**rule, "resources": ["pytorchjobs"]}],
        "sideEffects": "None",
    }
    body = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration"}
    path = f"/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/{name}"
    # Created, not applied: the operator's rotator writes caBundle into it.
    return path, {**body, "metadata": {"name": name}, "webhooks": [hook]}


async def _objects(admin: Client) -> None:
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    await admin.apply(f"/api/v1/namespaces/{NAMESPACE}", namespace)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET, "namespace": NAMESPACE}}
    for path, body in [
        (f"/api/v1/namespaces/{NAMESPACE}/secrets/{SECRET}", secret),
        *service_objects(Place(SERVICE, NAMESPACE, WEBHOOK_PORT)),
        _webhook(),
    ]:
        await admin.apply(path, body)


async def _copy_certificate(admin: Client, folder: Path) -> None:
    """What a kubelet does with the Secret's volume: its files into the folder that the operator serves from."""
    for _ in range(600):
        secret = await admin.get(f"/api/v1/namespaces/{NAMESPACE}/secrets/{SECRET}")
        data = secret.get("data") or {}
        if "tls.key" in data:
            for name, value in data.items():
                (folder / name).write_bytes(base64.b64decode(value))
            return
        await asyncio.sleep(0.05)
    raise DevclusterError("training-operator did not fill its certificate Secret in 30 s")


def jail(plane: ControlPlane, binary: Path, serving: Path) -> list[str]:
    """A /tmp of its own for a controller, so that two clusters' fixed certificate folders do not meet; what lies under
    /tmp on this machine and is needed is bound back."""
    root, path = str(plane.spec.root), str(binary)
    command = [containers.bwrap_path(), "--die-with-parent", "--dev-bind", "/", "/", "--tmpfs", "/tmp"]
    return [*command, "--bind", root, root, "--ro-bind", path, path, "--bind", str(serving), SERVING, "--"]


def _command(plane: ControlPlane, serving: Path, template: Path) -> list[str]:
    config = plane.kubeconfig("training-operator", plane.identity("training-operator", "training-operator", MASTERS))
    binary = binaries.binary("training-operator")
    return [
        *jail(plane, binary, serving),
        str(binary),
        f"--kubeconfig={config}",
        "--enable-scheme=pytorchjob",
        "--kube-api-qps=200",
        "--kube-api-burst=300",
        "--controller-threads=8",
        f"--webhook-server-port={WEBHOOK_PORT}",
        f"--metrics-bind-address={BRIDGE_IP}:{METRICS_PORT}",
        f"--health-probe-bind-address={BRIDGE_IP}:{PROBE_PORT}",
        f"--pytorch-init-container-image={plane.spec.init_image}",
        f"--pytorch-init-container-template-file={template}",
        "--zap-log-level=info",
    ]


async def until_ready(process: asyncio.subprocess.Process, name: str, port: int, logfile: Path, seconds: int) -> None:
    """Returns when a controller's probe says that it is ready. DevclusterError with the end of its log where it ends or
    takes longer."""
    async with aiohttp.ClientSession() as session:
        for _ in range(20 * seconds):
            if process.returncode is not None:
                raise DevclusterError(f"{name} ended while starting:\n{processes.tail(logfile)}")
            try:
                async with session.get(f"http://{BRIDGE_IP}:{port}/readyz") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                log.debug("%s does not listen yet", name)
            await asyncio.sleep(0.05)
    raise DevclusterError(f"{name} was not ready in {seconds} s:\n{processes.tail(logfile)}")


async def _until_serving(admin: Client) -> None:
    """A dry-run create passes through the webhook: proof that the API server trusts and reaches it."""
    container = {"name": "pytorch", "image": "none"}
    template = {"spec": {"containers": [container]}}
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": "probe"},
        "spec": {"pytorchReplicaSpecs": {"Master": {"replicas": 1, "template": template}}},
    }
    error: ApiError | None = None
    for _ in range(200):
        try:
            path = "/apis/kubeflow.org/v1/namespaces/default/pytorchjobs"
            await admin.request("POST", path, job, params={"dryRun": "All"})
            return
        except ApiError as refused:
            error = refused
            await asyncio.sleep(0.05)
    raise DevclusterError(f"the training-operator's webhook does not answer: {error}")


async def start(plane: ControlPlane, admin: Client) -> None:
    """Start training-operator and return when it takes jobs. The CRD is there already."""
    serving = plane.spec.root / "training-operator-certs"
    serving.mkdir(exist_ok=True)
    template = plane.spec.root / "init-pytorch.yaml"
    template.write_text(INIT_TEMPLATE)
    await _objects(admin)
    logfile = plane.spec.logs / "training-operator.log"
    command = _command(plane, serving, template)
    process = await processes.start(command, logfile, {**os.environ, "MY_POD_NAMESPACE": NAMESPACE})
    plane.running["training-operator"] = process
    await _copy_certificate(admin, serving)
    await until_ready(process, "training-operator", PROBE_PORT, logfile, 30)
    await _until_serving(admin)
