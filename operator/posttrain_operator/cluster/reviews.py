"""Token reviews, and the one Secret that the operator may write: what only the status server asks for.

Called by statusserver.access with the shared `Api`. A token is sent to the API server and nowhere else.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain_operator.cluster.api import Api, resource_path

_REVIEWS = resource_path("authentication.k8s.io/v1", "tokenreviews")
_EXTRA = "authentication.kubernetes.io/pod-"


@dataclass(frozen=True)
class TokenIdentity:
    """Whom a token speaks for. `pod_uid` None: the token is bound to no pod."""

    username: str
    pod_name: str | None
    pod_uid: str | None


async def review_token(api: Api, token: str, audience: str) -> TokenIdentity | None:
    """TokenReview for one audience. None where the token is not valid for it; ApiError where the review fails."""
    spec = {"token": token, "audiences": [audience]}
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
    review = await api.request("POST", _REVIEWS, body=body)
    return identity_of(review.get("status") or {}, audience)


def identity_of(status: Mapping[str, Any], audience: str) -> TokenIdentity | None:
    """Reads a TokenReview's status; authenticated for another audience is not authenticated."""
    if not status.get("authenticated") or audience not in (status.get("audiences") or ()):
        return None
    user = status.get("user") or {}
    extra = user.get("extra") or {}
    name, uid = ((extra.get(_EXTRA + key) or [None])[0] for key in ("name", "uid"))
    return TokenIdentity(username=user.get("username") or "", pod_name=name, pod_uid=uid)


async def read_secret(api: Api, namespace: str, name: str) -> tuple[str, dict[str, bytes]]:
    """(resourceVersion, data) of a Secret. NotFound where there is none."""
    found = await api.request("GET", resource_path("v1", "secrets", namespace, name))
    data = {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}
    return found["metadata"]["resourceVersion"], data


async def replace_secret(api: Api, namespace: str, name: str, version: str, data: Mapping[str, bytes]) -> None:
    """Replaces a Secret's data and keeps its labels and annotations. Conflict where it is not at `version`."""
    path = resource_path("v1", "secrets", namespace, name)
    found = await api.request("GET", path)
    found["metadata"]["resourceVersion"] = version
    found["data"] = {key: base64.b64encode(value).decode() for key, value in data.items()}
    await api.request("PUT", path, body=found)
