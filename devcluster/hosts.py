"""Names inside the cluster, as a hosts file per pod. Pure, except for `write_in_place`.

There is no DNS server: every service is a line in every pod's /etc/hosts. A ClusterIP service has its address; a
headless one the addresses of its ready endpoints, so a name appears when its pod is ready, as with the real DNS. The
file is rewritten in place: it is bind-mounted, and a rename would leave the old inode in the container.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from devcluster.state import CLUSTER_DOMAIN

Obj = dict[str, Any]
SERVICE_LABEL = "kubernetes.io/service-name"
NSSWITCH = "passwd: files\ngroup: files\nhosts: files\n"


def service_of(slice_: Obj) -> str:
    """namespace/name of the service that an EndpointSlice belongs to, or ''."""
    meta = slice_["metadata"]
    name = (meta.get("labels") or {}).get(SERVICE_LABEL, "")
    return f"{meta['namespace']}/{name}" if name else ""


def ready_endpoints(slices: Iterable[Obj]) -> list[Obj]:
    """Endpoints that take traffic (`ready` unset counts as ready)."""
    found = []
    for each in slices:
        for endpoint in each.get("endpoints") or []:
            if (endpoint.get("conditions") or {}).get("ready") is not False:
                found.append(endpoint)  # noqa: PERF401 - two loops and a condition read better so
    return found


def _names(stem: str, namespace: str, own: bool) -> str:
    dotted = f"{stem}.{namespace}"
    names = [f"{dotted}.svc.{CLUSTER_DOMAIN}", f"{dotted}.svc", dotted]
    return " ".join([*names, stem] if own else names)


def _service_lines(service: Obj, slices: Iterable[Obj], own: bool) -> list[str]:
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    address = service["spec"].get("clusterIP", "")
    if address and address != "None":
        return [f"{address}\t{_names(name, namespace, own)}"]
    lines = []
    for endpoint in ready_endpoints(slices):
        for ip in endpoint["addresses"]:
            lines.append(f"{ip}\t{_names(name, namespace, own)}")
            if endpoint.get("hostname"):
                lines.append(f"{ip}\t{_names(endpoint['hostname'] + '.' + name, namespace, own)}")
    return lines


def body(services: Iterable[Obj], slices: Mapping[str, list[Obj]], namespace: str) -> str:
    """The part of the hosts file that all pods of a namespace share; `slices` by namespace/name of their service."""
    lines: list[str] = []
    for service in services:
        meta = service["metadata"]
        found = slices.get(f"{meta['namespace']}/{meta['name']}", [])
        lines += _service_lines(service, found, meta["namespace"] == namespace)
    return "\n".join([*lines, ""])


def head(pod: Obj, address: str) -> str:
    """A pod's own lines: localhost, its name, its subdomain name and its host aliases."""
    name, namespace, spec = pod["metadata"]["name"], pod["metadata"]["namespace"], pod["spec"]
    own = spec.get("hostname") or name
    names = [own]
    if spec.get("subdomain"):
        names = [f"{own}.{spec['subdomain']}.{namespace}.svc.{CLUSTER_DOMAIN}", own]
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost", f"{address}\t{' '.join(names)}"]
    aliases = spec.get("hostAliases") or []
    lines += [f"{alias['ip']}\t{' '.join(alias.get('hostnames') or [])}" for alias in aliases]
    return "\n".join([*lines, ""])


def write_in_place(path: Path, text: str) -> None:
    """Replace a file's content and keep its inode; written before it is cut, so a reader never sees it empty."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        data = text.encode()
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)
