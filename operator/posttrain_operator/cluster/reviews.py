"""What the status server asks of the API server: token reviews, its own Secret, and progress by server-side apply.

Implements statusserver.view's protocols over the shared `Api`. Made once by the operator's start and handed to the
status server, which knows nothing of HTTP status codes: refusals become the three errors of the protocol, anything
else is passed on and tried again.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from posttrain_api import names
from posttrain_operator.cluster.api import APPLY_PATCH, Api, resource_path
from posttrain_operator.cluster.errors import BadBody, Conflict, Invalid, NotFound
from posttrain_operator.statusserver.view import JobView, ObjectMissing, TokenIdentity, WriteConflict, WriteRefused

_REVIEWS = resource_path("authentication.k8s.io/v1", "tokenreviews")
_EXTRA = "authentication.kubernetes.io/pod-"
_TERMINAL = frozenset({"Complete", "Failed"})


class StatusAccess:
    """The status server's API calls."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def review_token(self, token: str, audience: str) -> TokenIdentity | None:
        """TokenReview for one audience. None where the token is not valid for it."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        review = await self._api.request("POST", _REVIEWS, body=body)
        return identity_of(review.get("status") or {}, audience)

    async def apply_progress(self, namespace: str, name: str, version: str, progress: Mapping[str, Any]) -> None:
        """Writes status.progress at this resourceVersion: a recreated job has another one and is never touched."""
        path = resource_path(names.API_VERSION, names.PLURAL, namespace, name) + "/status"
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": name, "namespace": namespace, "resourceVersion": version},
            "status": {"progress": dict(progress)},
        }
        query = {"fieldManager": names.PROGRESS_MANAGER, "force": "true"}
        with _translated():
            await self._api.request("PATCH", path, body=body, query=query, headers={"Content-Type": APPLY_PATCH})

    async def read_job(self, namespace: str, name: str) -> JobView | None:
        """The job as the API server has it now."""
        try:
            found = await self._api.request("GET", resource_path(names.API_VERSION, names.PLURAL, namespace, name))
        except NotFound:
            return None
        return job_view(found)

    async def read_secret(self, namespace: str, name: str) -> tuple[str, dict[str, bytes]]:
        """(resourceVersion, data) of the Secret. ObjectMissing where there is none."""
        with _translated():
            found = await self._api.request("GET", resource_path("v1", "secrets", namespace, name))
        data = {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}
        return found["metadata"]["resourceVersion"], data

    async def replace_secret(self, namespace: str, name: str, version: str, data: Mapping[str, bytes]) -> None:
        """Replaces the Secret's data, keeping its labels and annotations (the chart's). WriteConflict if it changed."""
        path = resource_path("v1", "secrets", namespace, name)
        with _translated():
            found = await self._api.request("GET", path)
            found["metadata"]["resourceVersion"] = version
            found["data"] = {key: base64.b64encode(value).decode() for key, value in data.items()}
            await self._api.request("PUT", path, body=found)


def identity_of(status: Mapping[str, Any], audience: str) -> TokenIdentity | None:
    """Reads a TokenReview's status; authenticated for another audience is not authenticated."""
    if not status.get("authenticated") or audience not in (status.get("audiences") or ()):
        return None
    user = status.get("user") or {}
    extra = user.get("extra") or {}
    name, uid = ((extra.get(_EXTRA + key) or [None])[0] for key in ("name", "uid"))
    return TokenIdentity(username=user.get("username") or "", pod_name=name, pod_uid=uid)


def job_view(found: Mapping[str, Any]) -> JobView:
    """A job from its JSON."""
    status = found.get("status") or {}
    conditions = status.get("conditions") or ()
    ended = any(each.get("type") in _TERMINAL and each.get("status") == "True" for each in conditions)
    metadata = found["metadata"]
    return JobView(metadata["uid"], metadata["resourceVersion"], ended, status.get("progress"))


@contextmanager
def _translated() -> Iterator[None]:
    """The API's refusals in the protocol's words."""
    try:
        yield
    except Conflict as error:
        raise WriteConflict(str(error)) from error
    except NotFound as error:
        raise ObjectMissing(str(error)) from error
    except (Invalid, BadBody) as error:
        raise WriteRefused(str(error)) from error
