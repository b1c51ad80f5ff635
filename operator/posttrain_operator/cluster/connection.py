"""The connection to the API server: address, certificates and the token, for our own requests and for kopf's.

Used by `cluster.api` and by `watch`'s login. Inside a cluster the mounted service account is used, elsewhere
KUBECONFIG (or ~/.kube/config). The client library reads the token file again every minute, because such tokens
rotate.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, Configuration

from posttrain_operator.cluster.streams import WatchResponse

_IN_CLUSTER = "KUBERNETES_SERVICE_HOST"
MAX_CONNECTIONS = 48
MAX_WATCH_CONNECTIONS = 32


class Connection:
    """One client with its own pool of connections; made inside the running loop, closed last."""

    def __init__(self, configuration: Configuration) -> None:
        configuration.connection_pool_maxsize = MAX_CONNECTIONS
        # With it aiohttp asks a thread for the environment's proxies at every request: half of a request's CPU.
        configuration.client_session_kwargs = {"trust_env": False}
        self._configuration = configuration
        self.client = ApiClient(configuration)
        self.agent = "posttrain-operator"
        """Who asks, for the API server's audit log."""

    @property
    def server(self) -> str:
        return str(self._configuration.host).rstrip("/")

    async def headers(self) -> dict[str, str]:
        """The authorization header, fresh; empty where a client certificate speaks for us."""
        settings = await self._configuration.auth_settings()
        token = settings.get("BearerToken", {}).get("value")
        return {"Authorization": str(token)} if token else {}

    async def watch_session(self, traces: Iterable[aiohttp.TraceConfig]) -> aiohttp.ClientSession:
        """A session of its own for the watches, with the token of this moment."""
        connector = aiohttp.TCPConnector(limit=MAX_WATCH_CONNECTIONS, ssl=self.client.rest_client.ssl_context)
        return aiohttp.ClientSession(
            connector=connector,
            headers=await self.headers(),
            trace_configs=list(traces),
            response_class=WatchResponse,
            read_bufsize=2**21,
        )

    async def close(self) -> None:
        await self.client.close()


async def connect() -> Connection:
    """Connects with the service account where there is one, else with the kubeconfig. ConfigException where neither
    is there."""
    configuration: Configuration = type.__call__(Configuration)
    if os.environ.get(_IN_CLUSTER) and not os.environ.get("KUBECONFIG"):
        config.load_incluster_config(configuration)
    else:
        await config.load_kube_config(client_configuration=configuration, persist_config=False)
    return Connection(configuration)
