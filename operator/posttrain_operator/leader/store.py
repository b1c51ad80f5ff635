"""The Lease on the API server. Made by `app`, with a connection of its own."""

from __future__ import annotations

from posttrain_operator.cluster.api import Api, resource_path
from posttrain_operator.cluster.errors import NotFound
from posttrain_operator.leader.lease import API_VERSION, PLURAL, Lease, lease_of, manifest


class ApiLeaseStore:
    """Implements elector.LeaseStore."""

    def __init__(self, api: Api, namespace: str, name: str) -> None:
        self._api, self._namespace, self._name = api, namespace, name

    async def read(self) -> Lease | None:
        try:
            return lease_of(await self._api.request("GET", self._path(self._name)))
        except NotFound:
            return None

    async def create(self, lease: Lease) -> Lease:
        return lease_of(await self._api.request("POST", self._path(), body=self._body(lease)))

    async def replace(self, lease: Lease) -> Lease:
        """PUT with the version; one that was deleted meanwhile is NotFound or Conflict: read it again."""
        return lease_of(await self._api.request("PUT", self._path(self._name), body=self._body(lease)))

    def _path(self, name: str | None = None) -> str:
        return resource_path(API_VERSION, PLURAL, self._namespace, name)

    def _body(self, lease: Lease) -> dict[str, object]:
        return manifest(lease, self._namespace, self._name)
