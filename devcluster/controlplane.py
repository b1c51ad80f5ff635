"""Starts etcd, kube-apiserver, kube-controller-manager and kube-scheduler as child processes.

Called by the supervisor, inside the cluster's namespace. Certificates and identities are those of a real cluster; what
differs (no fsync, no leader election, a 20 s node grace period) is speed for tests, not semantics.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from devcluster import audit, binaries, processes
from devcluster.api import ApiError, Client
from devcluster.certificates import Authority, KeyPair, Subject, write_kubeconfig
from devcluster.errors import DevclusterError
from devcluster.network import Network
from devcluster.state import API_SERVICE_IP, CLUSTER_DOMAIN, SERVICE_RANGE, ClusterSpec

ISSUER = f"https://kubernetes.default.svc.{CLUSTER_DOMAIN}"
KUBELET_CLIENT = "kube-apiserver-kubelet-client"
MASTERS = ("system:masters",)
# Without nodes only what the API itself needs: owner references, namespaces, and each namespace's account and CA.
LEAN_CONTROLLERS = ",".join(
    f"{name}-controller"
    for name in (
        "clusterrole-aggregation",
        "garbage-collector",
        "namespace",
        "root-ca-certificate-publisher",
        "serviceaccount",
    )
)


@dataclass
class ControlPlane:
    """The running components, and what others need to speak to them."""

    spec: ClusterSpec
    network: Network
    say: Callable[[str], None]
    ca: Authority = field(init=False)
    running: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)
    _commands: dict[str, tuple[list[str], dict[str, str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ca = Authority(self.spec.pki)

    def identity(self, stem: str, user: str, groups: tuple[str, ...] = ()) -> KeyPair:
        """A client certificate for this user."""
        return self.ca.issue(stem, Subject(user, groups))

    def client(self, pair: KeyPair) -> Client:
        """A client with this identity."""
        return Client(self.network.server, self.ca.cert_path, pair)

    def kubeconfig(self, stem: str, pair: KeyPair, server: str = "") -> Path:
        """A kubeconfig of this identity for a process inside the namespace."""
        path = self.spec.root / f"{stem}.kubeconfig"
        return write_kubeconfig(path, server or self.network.server, self.ca.cert_path, pair)

    async def run(self, name: str, arguments: list[str], env: dict[str, str] | None = None) -> None:
        """Start a component; its output goes to logs/<name>.log."""
        self._commands[name] = ([str(binaries.binary(name)), *arguments], {**os.environ, **(env or {})})
        await self.again(name)

    async def again(self, name: str) -> None:
        """Start a component with the arguments that it was started with before."""
        command, env = self._commands[name]
        self.running[name] = await processes.start(command, self.spec.logs / f"{name}.log", env, self.spec.root)

    async def start(self, prepare: Callable[[Client], Awaitable[None]]) -> Client:
        """Start everything and return an administrator's client; raises DevclusterError with the log's end.

        `prepare` runs before the controllers: the garbage collector looks for new kinds only every 30 s, and until then
        the children of such a kind's objects outlive them.
        """
        admin = self.client(self.identity("admin", "kubernetes-admin", MASTERS))
        await self._start_etcd()
        await self._start_api()
        await self._until_ready(admin)
        await prepare(admin)
        await self._start_controllers()
        if not self.spec.control_plane_only:
            await self._start_scheduler()
        await self._until_usable(admin)
        return admin

    async def _start_etcd(self) -> None:
        client = f"http://127.0.0.1:{self.network.etcd_port}"
        peer = f"http://127.0.0.1:{self.network.etcd_peer_port}"
        await self.run(
            "etcd",
            [
                f"--data-dir={self.spec.root / 'etcd'}",
                f"--listen-client-urls={client}",
                f"--advertise-client-urls={client}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
                "--unsafe-no-fsync",
                "--log-level=warn",
            ],
        )
        await self._until_connects("etcd", self.network.etcd_port)

    async def _until_connects(self, name: str, port: int) -> None:
        for _ in range(600):
            self._must_run(name)
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            except OSError:  # not up yet
                await asyncio.sleep(0.05)
        raise DevclusterError(f"{name} did not open port {port} in 30 s:\n{self._tail(name)}")

    async def _start_api(self) -> None:
        names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            f"kubernetes.default.svc.{CLUSTER_DOMAIN}",
        ]
        names += ["localhost", "127.0.0.1", API_SERVICE_IP, self.network.advertise]
        serving = self.ca.issue("apiserver", Subject("kube-apiserver", (), tuple(names)))
        kubelet = self.identity("kubelet-client", KUBELET_CLIENT, ("kubeadm:cluster-admins",))
        signing = self.ca.signing_key("service-account")
        await self.run(
            "kube-apiserver",
            [
                f"--etcd-servers=http://127.0.0.1:{self.network.etcd_port}",
                f"--secure-port={self.network.api_port}",
                f"--bind-address={self.network.host}",
                f"--advertise-address={self.network.advertise}",
                f"--tls-cert-file={serving.cert}",
                f"--tls-private-key-file={serving.key}",
                f"--client-ca-file={self.ca.cert_path}",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                f"--service-account-issuer={ISSUER}",
                f"--service-account-key-file={signing.cert}",
                f"--service-account-signing-key-file={signing.key}",
                f"--service-cluster-ip-range={SERVICE_RANGE}",
                "--kubelet-preferred-address-types=InternalIP",
                f"--kubelet-certificate-authority={self.ca.cert_path}",
                f"--kubelet-client-certificate={kubelet.cert}",
                f"--kubelet-client-key={kubelet.key}",
                "--allow-privileged=true",
                "--profiling=false",
                *(audit.flags(self.spec.root) if self.spec.audit else ()),
            ],
        )

    async def _start_controllers(self) -> None:
        pair = self.identity("controller-manager", "system:kube-controller-manager")
        controllers = LEAN_CONTROLLERS if self.spec.control_plane_only else "*"
        await self.run(
            "kube-controller-manager",
            [
                f"--kubeconfig={self.kubeconfig('controller-manager', pair)}",
                f"--controllers={controllers}",
                "--use-service-account-credentials=true",
                f"--service-account-private-key-file={self.spec.pki / 'service-account.key'}",
                f"--root-ca-file={self.ca.cert_path}",
                "--leader-elect=false",
                "--secure-port=0",
                "--node-monitor-grace-period=20s",
                "--kube-api-qps=200",
                "--kube-api-burst=300",
            ],
        )

    async def _start_scheduler(self) -> None:
        pair = self.identity("scheduler", "system:kube-scheduler")
        config = self.kubeconfig("scheduler", pair)
        await self.run("kube-scheduler", [f"--kubeconfig={config}", "--leader-elect=false", "--secure-port=0"])

    async def _until_ready(self, admin: Client) -> None:
        started = time.monotonic()
        while time.monotonic() - started < 120:
            self._must_run("kube-apiserver")
            try:
                await admin.request("GET", "/readyz")
                return
            except (aiohttp.ClientError, ApiError):  # not up yet, or a start hook still runs
                await asyncio.sleep(0.05)
        raise DevclusterError(f"kube-apiserver was not ready in 120 s:\n{self._tail('kube-apiserver')}")

    async def _until_usable(self, admin: Client) -> None:
        """Pods can be created only once the default namespace has its service account."""
        started = time.monotonic()
        while time.monotonic() - started < 60:
            self._must_run("kube-controller-manager")
            try:
                await admin.get("/api/v1/namespaces/default/serviceaccounts/default")
                await admin.get("/api/v1/namespaces/default/configmaps/kube-root-ca.crt")
                return
            except ApiError:
                await asyncio.sleep(0.05)
        raise DevclusterError(f"no default service account after 60 s:\n{self._tail('kube-controller-manager')}")

    def _must_run(self, name: str) -> None:
        code = self.running[name].returncode
        if code is not None:
            raise DevclusterError(f"{name} ended with {code} while starting; its last lines:\n{self._tail(name)}")

    def _tail(self, name: str) -> str:
        return processes.tail(self.spec.logs / f"{name}.log")

    async def stop(self) -> None:
        """Stop in the reverse order of starting."""
        for process in reversed(self.running.values()):
            await processes.stop(process)
