"""The only door to the API server, and the only package that imports the kubernetes client.

The worker executes with it what `reconcile` decided, the observer looks objects up, the resync compares lists, the
status server writes progress. It decides nothing. Objects are plain dicts in and out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_api import names
from posttrain_operator.cluster.api import APPLY_PATCH, MERGE_PATCH, METADATA_LIST, Api, resource_path
from posttrain_operator.cluster.errors import NotFound
from posttrain_operator.cluster.kinds import CORE_EVENT, JOB, POD, SELECTORS, Kind

PAGE = 500


@dataclass(frozen=True)
class Deletion:
    """How an object is deleted: only the one of this uid, with this grace; children after it, in the background."""

    uid: str | None = None
    grace_seconds: int | None = None

    def body(self) -> dict[str, Any]:
        options: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if self.uid:
            options["preconditions"] = {"uid": self.uid}
        if self.grace_seconds is not None:
            options["gracePeriodSeconds"] = self.grace_seconds
        return options


class Cluster:
    """Verbs by kind. Raises the types of `cluster.errors`."""

    def __init__(self, api: Api) -> None:
        self.api = api

    async def get(self, kind: Kind, namespace: str | None, name: str) -> dict[str, Any] | None:
        """The object, or None where there is none."""
        try:
            return await self.api.request("GET", _path(kind, namespace, name))
        except NotFound:
            return None

    async def create(self, kind: Kind, namespace: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST. AlreadyExists where the name is taken; NotFound where the kind or the namespace is missing."""
        return await self.api.request(
            "POST", _path(kind, namespace), body=body, query={"fieldManager": "posttrain-operator"}
        )

    async def delete(self, kind: Kind, namespace: str, name: str, how: Deletion) -> None:
        """Deletes; an object that is gone already is success. Conflict where the name has another uid."""
        try:
            await self.api.request("DELETE", _path(kind, namespace, name), body=how.body())
        except NotFound:
            return

    async def merge_patch(self, kind: Kind, namespace: str, name: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Merge patch; a resourceVersion in the body is a precondition (Conflict)."""
        return await self._patch(_path(kind, namespace, name), body, MERGE_PATCH, {})

    async def apply(self, kind: Kind, namespace: str, body: Mapping[str, Any], manager: str) -> dict[str, Any]:
        """Server-side apply of a whole object of ours."""
        path = _path(kind, namespace, str(body["metadata"]["name"]))
        return await self._patch(path, body, APPLY_PATCH, {"fieldManager": manager, "force": "true"})

    async def apply_status(
        self, namespace: str, name: str, body: Mapping[str, Any], manager: str, resource_version: str
    ) -> dict[str, Any]:
        """Server-side apply of a job's status under `manager`, always with the resourceVersion: the uid is ignored.

        Conflict where the job changed, NotFound where it is gone, BadBody where the body does not fit the schema.
        """
        metadata = {"name": name, "namespace": namespace, "resourceVersion": resource_version}
        manifest = {"apiVersion": JOB.api_version, "kind": JOB.kind, "metadata": metadata, "status": body}
        path = _path(JOB, namespace, name) + "/status"
        return await self._patch(path, manifest, APPLY_PATCH, {"fieldManager": manager, "force": "true"})

    async def events_about(self, namespace: str, selector: str) -> list[dict[str, Any]]:
        """Core events that a field selector finds, in any order."""
        query = {"fieldSelector": selector, "limit": "100"}
        answer = await self.api.request("GET", _path(CORE_EVENT, namespace), query=query)
        return list(answer.get("items") or ())

    async def pods_of(self, namespace: str, job: str) -> list[dict[str, Any]]:
        """A job's pods as the API server has them now."""
        query = {"labelSelector": f"{names.LABEL_JOB_NAME}={job}"}
        answer = await self.api.request("GET", _path(POD, namespace), query=query)
        return list(answer.get("items") or ())

    async def has_kind(self, kind: Kind) -> bool:
        """Whether the API server serves the kind."""
        root = f"/apis/{kind.api_version}" if "/" in kind.api_version else f"/api/{kind.api_version}"
        try:
            found = await self.api.request("GET", root)
        except NotFound:
            return False
        return any(resource.get("name") == kind.plural for resource in found.get("resources", ()))

    async def list_metadata(self, kind: Kind, namespace: str | None) -> AsyncIterator[dict[str, Any]]:
        """Metadata of every object that is watched, page by page."""
        query = {"limit": str(PAGE), "labelSelector": SELECTORS[kind]}
        while True:
            page = await self.api.request("GET", _path(kind, namespace), query=query, headers={"Accept": METADATA_LIST})
            for item in page.get("items") or ():  # null where there are none
                yield item["metadata"]
            token = page.get("metadata", {}).get("continue")
            if not token:
                return
            query = {**query, "continue": token}

    async def _patch(self, path: str, body: Mapping[str, Any], media: str, query: Mapping[str, str]) -> dict[str, Any]:
        return await self.api.request("PATCH", path, body=body, query=query, headers={"Content-Type": media})


def _path(kind: Kind, namespace: str | None, name: str | None = None) -> str:
    return resource_path(kind.api_version, kind.plural, namespace, name)
