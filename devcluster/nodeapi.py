"""What a node says to the API server and asks of it, under its own identity `system:node:<name>`.

The Node authorizer lets a node read exactly the ConfigMaps, Secrets and claims of its pods; its graph lags some
milliseconds behind the scheduler, so a refusal is asked again before it counts.
"""

import asyncio
import hashlib
import logging
from collections.abc import Iterable
from datetime import UTC, datetime

from devcluster.api import ApiError, Client, Obj
from devcluster.podstatus import stamp
from devcluster.volumes import Token

log = logging.getLogger(__name__)
PATHS = {
    "configmap": "/api/v1/namespaces/{namespace}/configmaps/{name}",
    "secret": "/api/v1/namespaces/{namespace}/secrets/{name}",
    "claim": "/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}",
    "volume": "/api/v1/persistentvolumes/{name}",
}
REFUSED_TRIES = 20


def now() -> datetime:
    return datetime.now(UTC)


def pod_path(pod: Obj) -> str:
    """The API path of a pod."""
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


class NodeApi:
    """One node's requests."""

    def __init__(self, client: Client, node: str) -> None:
        self.client, self.node = client, node
        self._counts: dict[str, int] = {}

    async def fetch(self, kind: str, namespace: str, name: str) -> Obj | None:
        """A ConfigMap, Secret, claim or volume; None where it does not exist."""
        path = PATHS[kind].format(namespace=namespace, name=name)
        for attempt in range(REFUSED_TRIES):
            try:
                return await self.client.get(path)
            except ApiError as error:
                if error.code == 404:
                    return None
                if error.code != 403 or attempt == REFUSED_TRIES - 1:
                    raise
                await asyncio.sleep(0.1)
        return None

    async def fetch_all(self, namespace: str, wanted: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Obj | None]:
        """Several (kind, name) at once."""
        keys = sorted(wanted)
        found = await asyncio.gather(*(self.fetch(kind, namespace, name) for kind, name in keys))
        return dict(zip(keys, found, strict=True))

    async def token(self, pod: Obj, wanted: Token) -> str:
        """A service-account token bound to the pod, from TokenRequest."""
        meta = pod["metadata"]
        account = pod["spec"].get("serviceAccountName") or "default"
        bound = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
        spec = {
            "audiences": [wanted.audience] if wanted.audience else [],
            "expirationSeconds": wanted.seconds,
            "boundObjectRef": bound,
        }
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/{account}/token"
        answer = await self.client.post(path, body)
        return str(answer["status"]["token"])

    async def patch_status(self, pod: Obj, status: Obj) -> None:
        """Send a pod's status; one that is gone or replaced meanwhile is no error."""
        # Addresses are merged by address: a pod that comes back with another one would have two, which is refused.
        whole: Obj = {name: [*status[name], {"$patch": "replace"}] for name in ("podIPs", "hostIPs") if name in status}
        body = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": {**status, **whole}}
        try:
            await self.client.patch(pod_path(pod) + "/status", body)
        except ApiError as error:
            if error.code not in (404, 409):
                raise

    async def delete_pod(self, pod: Obj) -> None:
        """Take a terminated pod's object away; one that is gone already is normal."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": 0,
            "preconditions": {"uid": pod["metadata"]["uid"]},
        }
        try:
            await self.client.delete(pod_path(pod), options)
        except ApiError as error:
            if error.code not in (404, 409):
                raise

    async def event(self, pod: Obj, kind: str, reason: str, message: str) -> None:
        """Record an event on the pod; a repeated one counts up. A lost event is logged, never fatal."""
        meta = pod["metadata"]
        digest = hashlib.sha256(f"{meta['uid']}{reason}{message}".encode()).hexdigest()[:16]
        name, when = f"{meta['name']}.{digest}", stamp(now())
        path = f"/api/v1/namespaces/{meta['namespace']}/events"
        involved = {"apiVersion": "v1", "kind": "Pod", "namespace": meta["namespace"]}
        involved |= {"name": meta["name"], "uid": meta["uid"], "resourceVersion": meta["resourceVersion"]}
        body = {
            "metadata": {"name": name, "namespace": meta["namespace"]},
            "involvedObject": involved,
            "reason": reason,
            "message": message[:1000],
            "type": kind,
            "count": 1,
            "firstTimestamp": when,
            "lastTimestamp": when,
            "source": {"component": "kubelet", "host": self.node},
            "reportingComponent": "kubelet",
            "reportingInstance": self.node,
        }
        try:
            await self._record(path, name, body)
        except ApiError as error:
            log.info("event %s on %s was not recorded: %s", reason, meta["name"], error)

    async def _record(self, path: str, name: str, body: Obj) -> None:
        # A node may create and patch events, not read them: it counts by itself.
        count = self._counts[name] = self._counts.get(name, 0) + 1
        if count == 1:
            await self.client.post(path, body)
        else:
            await self.client.patch(f"{path}/{name}", {"count": count, "lastTimestamp": body["lastTimestamp"]})
