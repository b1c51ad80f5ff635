"""Reads of an API server for tests that poll, without kubectl: each kubectl costs a tenth of a second of a core.

Called by `testing.Cluster` and the tests' kits. Every thread has a connection of its own, kept open.
"""

import http.client
import json
import ssl
import threading
from typing import Any
from urllib.parse import urlencode, urlsplit

from devcluster.state import ClusterSpec

Obj = dict[str, Any]
SECONDS = 30.0
KINDS = {
    "ptj": "/apis/posttrain.dev/v1alpha1{}/posttrainingjobs",
    "pytorchjob": "/apis/kubeflow.org/v1{}/pytorchjobs",
    "trainjob": "/apis/trainer.kubeflow.org/v1alpha1{}/trainjobs",
    "trainingruntime": "/apis/trainer.kubeflow.org/v1alpha1{}/trainingruntimes",
    "jobset": "/apis/jobset.x-k8s.io/v1alpha2{}/jobsets",
    "pod": "/api/v1{}/pods",
    "configmap": "/api/v1{}/configmaps",
    "secret": "/api/v1{}/secrets",
    "pvc": "/api/v1{}/persistentvolumeclaims",
    "serviceaccount": "/api/v1{}/serviceaccounts",
    "node": "/api/v1{}/nodes",
}
"""What can be read, by kubectl's names; the place of the namespace is left open."""


class Reader:
    """An administrator's GETs."""

    def __init__(self, spec: ClusterSpec) -> None:
        self._spec, self._mine = spec, threading.local()

    def find(self, kind: str, name: str, namespace: str | None = None) -> Obj | None:
        """One object, None where it is not there (or its kind is not). RuntimeError where the API server refuses or
        does not answer."""
        return self._get(f"{_path(kind, namespace)}/{name}")

    def items(self, kind: str, namespace: str, selector: str = "") -> list[Obj]:
        """All of a kind that have these labels, without their apiVersion and kind. RuntimeError as for `find`."""
        query = f"?{urlencode({'labelSelector': selector})}" if selector else ""
        return list((self._get(_path(kind, namespace) + query) or {}).get("items") or ())

    def _get(self, path: str) -> Obj | None:
        try:
            code, raw = self._asked(path)
        except (OSError, http.client.HTTPException) as error:
            raise RuntimeError(f"GET {path}: {type(error).__name__}: {error}") from error
        if code == http.HTTPStatus.NOT_FOUND:
            return None
        if code != http.HTTPStatus.OK:
            raise RuntimeError(f"GET {path} was answered with {code}: {raw[:500].decode(errors='replace')}")
        return dict(json.loads(raw))

    def _asked(self, path: str) -> tuple[int, bytes]:
        """Once more on a new connection where the kept one has gone stale."""
        kept: http.client.HTTPSConnection | None = getattr(self._mine, "connection", None)
        if kept is not None:
            try:
                return _exchange(kept, path)
            except (OSError, http.client.HTTPException):
                kept.close()
        self._mine.connection = self._connect()
        return _exchange(self._mine.connection, path)

    def _connect(self) -> http.client.HTTPSConnection:
        pki, address = self._spec.pki, urlsplit(str(self._spec.ready()["api"]))
        context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        context.load_cert_chain(pki / "admin-outside.crt", pki / "admin-outside.key")
        return http.client.HTTPSConnection(str(address.hostname), address.port, timeout=SECONDS, context=context)


def _exchange(connection: http.client.HTTPSConnection, path: str) -> tuple[int, bytes]:
    connection.request("GET", path, headers={"Accept": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def _path(kind: str, namespace: str | None) -> str:
    return KINDS[kind].format(f"/namespaces/{namespace}" if namespace else "")
