"""A status server on a free port with TLS, over an API server that is a few dictionaries. For several test files."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from posttrain_api import names
from posttrain_operator.cluster.reviews import TokenIdentity
from posttrain_operator.statusserver.keeper import SecretPlace
from posttrain_operator.statusserver.server import ServerOptions, StatusServer, start
from posttrain_operator.statusserver.view import JobView, WriteConflict

PLACE = SecretPlace("ops", "status", ("localhost", "127.0.0.1"))


@dataclass
class FakeCluster:
    """Jobs by (namespace, name), pods by job, identities by token; only our audience is known to it."""

    jobs: dict[tuple[str, str], JobView] = field(default_factory=dict)
    pods: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    tokens: dict[str, TokenIdentity] = field(default_factory=dict)
    writes: list[dict[str, Any]] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    secret: tuple[int, dict[str, bytes]] = (1, {})
    review_error: Exception | None = None
    reviews: int = 0

    async def look(self, namespace: str, name: str, pod: tuple[str, str]) -> None:
        """Everything is in memory."""

    def job(self, namespace: str, name: str) -> JobView | None:
        return self.jobs.get((namespace, name))

    def pod_uids(self, namespace: str, name: str) -> frozenset[str]:
        return self.pods.get((namespace, name), frozenset())

    async def read_job(self, namespace: str, name: str) -> JobView | None:
        return self.job(namespace, name)

    async def review_token(self, token: str, audience: str) -> TokenIdentity | None:
        self.reviews += 1
        if self.review_error:
            raise self.review_error
        return self.tokens.get(token) if audience == names.STATUS_AUDIENCE else None

    async def apply_progress(self, namespace: str, name: str, version: str, progress: dict[str, Any]) -> None:
        job = self.jobs[namespace, name]
        if version != job.resource_version:
            raise WriteConflict(version)
        self.jobs[namespace, name] = replace(job, resource_version=version + "0", progress=progress)
        self.writes.append(progress)

    async def read_secret(self, namespace: str, name: str) -> tuple[str, dict[str, bytes]]:
        return str(self.secret[0]), self.secret[1]

    async def replace_secret(self, namespace: str, name: str, version: str, data: dict[str, bytes]) -> None:
        self.secret = (self.secret[0] + 1, data)


@dataclass
class Rig:
    """The running server, what it sees, and a client that trusts it."""

    cluster: FakeCluster
    server: StatusServer
    client: aiohttp.ClientSession

    def url(self, path: str = names.STATUS_PATH, namespace: str = "team", name: str = "job") -> str:
        return f"https://localhost:{self.server.port}{path.format(namespace=namespace, name=name)}"

    async def post(self, body: Any = None, token: str | None = "good", **where: str) -> tuple[int, dict[str, Any], Any]:
        """(code, answer, headers) of one report; bytes are sent as they are."""
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        data = {"data": body} if isinstance(body, bytes) else {"json": body or {"phase": "Training", "step": 1}}
        async with self.client.post(self.url(**where), headers=headers, **data) as answer:
            return answer.status, await answer.json(), answer.headers


def pod(name: str, uid: str, namespace: str = "team") -> TokenIdentity:
    return TokenIdentity(f"system:serviceaccount:{namespace}:default", name, uid)


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Rig]:
    """Job team/job with pod p1 (token `good`), a neighbour pod of the same account, a pod of another namespace."""
    cluster = FakeCluster(
        jobs={("team", "job"): JobView("u1", "1", False), ("team", "done"): JobView("u2", "1", True)},
        pods={("team", "job"): frozenset({"p1"}), ("team", "done"): frozenset({"p1"})},
        tokens={
            "good": pod("job-master-0", "p1"),
            "neighbour": pod("shell", "p9"),
            "other": pod("job-master-0", "p1", "elsewhere"),
            "unbound": TokenIdentity("system:serviceaccount:team:default", None, None),
        },
    )
    settings = ServerOptions(PLACE, host="127.0.0.1", port=0, count=cluster.results.append, **options)
    server = await start(settings, cluster, cluster)
    trust = ssl.create_default_context(cadata=server.ca_bundle())
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as client:
        try:
            yield Rig(cluster, server, client)
        finally:
            await server.close()
