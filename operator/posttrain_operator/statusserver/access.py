"""The status server's calls over the operator's `Cluster`: refusals become the errors of `view`.

Made by `start_status_server`. With it the rest of the package knows no HTTP codes, and its tests need no API server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from posttrain_api import names
from posttrain_operator.cluster import Cluster, reviews
from posttrain_operator.cluster.errors import BadBody, Conflict, Invalid, NotFound
from posttrain_operator.cluster.kinds import JOB
from posttrain_operator.slim import job_record
from posttrain_operator.statusserver.view import JobView, ObjectMissing, WriteConflict, WriteRefused, view_of


class ClusterAccess:
    """Implements view.Access."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def review_token(self, token: str, audience: str) -> reviews.TokenIdentity | None:
        """See cluster.reviews."""
        return await reviews.review_token(self._cluster.api, token, audience)

    async def apply_progress(self, namespace: str, name: str, version: str, progress: Mapping[str, Any]) -> None:
        """Writes status.progress at this resourceVersion: a recreated job has another one and is never touched."""
        body = {"progress": dict(progress)}
        with _translated():
            await self._cluster.apply_status(namespace, name, body, names.PROGRESS_MANAGER, version)

    async def read_job(self, namespace: str, name: str) -> JobView | None:
        """The job as the API server has it now."""
        found = await self._cluster.get(JOB, namespace, name)
        return view_of(job_record(found)) if found is not None else None

    async def read_secret(self, namespace: str, name: str) -> tuple[str, dict[str, bytes]]:
        """(resourceVersion, data) of the Secret."""
        with _translated():
            return await reviews.read_secret(self._cluster.api, namespace, name)

    async def replace_secret(self, namespace: str, name: str, version: str, data: Mapping[str, bytes]) -> None:
        """Replaces the Secret's data at this resourceVersion."""
        with _translated():
            await reviews.replace_secret(self._cluster.api, namespace, name, version, data)


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
