"""A namespace with jobs, pods and real tokens, and the status server under the operator's own rights."""

from __future__ import annotations

import base64
import json
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from kubernetes.aio import config
from kubernetes.aio.client import Configuration
from operator_kit import SYSTEM

from devcluster.testing import Cluster
from posttrain_api import names
from posttrain_operator.cluster import Cluster as Access
from posttrain_operator.cluster.api import Api
from posttrain_operator.cluster.connection import Connection
from posttrain_operator.slim import job_record
from posttrain_operator.statusserver.access import ClusterAccess
from posttrain_operator.statusserver.keeper import SecretPlace
from posttrain_operator.statusserver.server import ServerOptions, StatusServer, start
from posttrain_operator.statusserver.view import JobView, view_of
from posttrain_operator.statusserver.writer import WriterTiming

TEAM = "team"
SECRET = "posttrain-operator-status"
FAST = WriterTiming(urgent_interval=0.1, min_interval=0.2, max_interval=0.5)


class TestView:
    """The view that the operator's cache would give, refreshed by hand: it may be stale, as a cache may be."""

    __test__ = False

    def __init__(self, cluster: Cluster, kubeconfig: Path) -> None:
        self._cluster, self.kubeconfig = cluster, kubeconfig
        self.jobs: dict[str, JobView] = {}
        self.pods: dict[str, frozenset[str]] = {}

    async def look(self, namespace: str, name: str, pod: tuple[str, str]) -> None:
        """Everything is in memory."""

    def job(self, namespace: str, name: str) -> JobView | None:
        return self.jobs.get(name) if namespace == TEAM else None

    def pod_uids(self, namespace: str, name: str) -> frozenset[str]:
        return self.pods.get(name, frozenset()) if namespace == TEAM else frozenset()

    def refresh(self, name: str) -> dict[str, Any]:
        found = self._cluster.get("ptj", name, "-n", TEAM)
        self.jobs[name] = view_of(job_record(found))
        return found


def job(name: str) -> dict[str, Any]:
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": TEAM},
        "spec": {
            "stage": "SFT",
            "model": {"uri": "hf://org/model"},
            "data": {"train": [{"uri": "pvc://data/train.jsonl"}]},
            "lora": {"rank": 8},
            "storage": {"claimName": "runs"},
        },
    }


def pod(name: str, namespace: str = TEAM) -> dict[str, Any]:
    container = {"name": names.CONTAINER, "image": "none"}
    spec = {"serviceAccountName": "default", "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def token(cluster: Cluster, pod_name: str | None, namespace: str = TEAM, audience: str = names.STATUS_AUDIENCE) -> str:
    """A real token of the default service account, bound to a pod or to none."""
    bound = ["--bound-object-kind=Pod", f"--bound-object-name={pod_name}"] if pod_name else []
    return cluster.kubectl("create", "token", "default", "-n", namespace, f"--audience={audience}", *bound).strip()


def expired(cluster: Cluster, valid: str) -> str:
    """The same token, signed with the cluster's own key, but an hour past its end."""
    header, payload, _ = valid.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    past = int(time.time()) - 3600
    claims |= {"iat": past - 600, "nbf": past - 600, "exp": past}
    signed = f"{header}.{_encode(json.dumps(claims).encode())}"
    pem = (cluster.spec.pki / "service-account.key").read_bytes()
    key = serialization.load_pem_private_key(pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{_encode(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


class Running:
    """The server with a client that trusts it."""

    def __init__(self, server: StatusServer, access: Access, client: aiohttp.ClientSession) -> None:
        self.server, self.access, self.client = server, access, client

    def url(self, name: str, path: str = names.STATUS_PATH) -> str:
        return f"https://localhost:{self.server.port}{path.format(namespace=TEAM, name=name)}"

    async def post(self, name: str, bearer: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        body = {"phase": "Training", "step": 1, "totalSteps": 100, **fields}
        headers = {"Authorization": f"Bearer {bearer}"}
        async with self.client.post(self.url(name), json=body, headers=headers) as answer:
            return answer.status, await answer.json()


@asynccontextmanager
async def running(view: TestView) -> AsyncIterator[Running]:
    """A status server with the operator's own token; it keeps its certificates in the chart's Secret."""
    configuration = Configuration()
    await config.load_kube_config(str(view.kubeconfig), client_configuration=configuration, persist_config=False)
    connection = Connection(configuration)
    access = Access(Api(connection))
    place = SecretPlace(SYSTEM, SECRET, ("localhost", "127.0.0.1"))
    options = ServerOptions(place, host="127.0.0.1", port=0, writing=FAST, per_pod=(100, 0.1))
    server = await start(options, ClusterAccess(access), view)
    trust = ssl.create_default_context(cadata=server.ca_bundle())
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as client:
        try:
            yield Running(server, access, client)
        finally:
            await server.close()
            await connection.close()


def write_mounts(folder: Path, server: StatusServer, bearer: str) -> dict[str, str]:
    """The files of the projected volume and the environment that a trainer pod would have, without the URLs."""
    (folder / "ca.crt").write_text(server.ca_bundle())
    (folder / "token").write_text(bearer)
    ca, path = str(folder / "ca.crt"), str(folder / "token")
    return {
        names.ENV_STATUS_CA: ca,
        names.ENV_STATUS_TOKEN: path,
        names.ENV_KUBEFLOW_CA: ca,
        names.ENV_KUBEFLOW_TOKEN: path,
    }
