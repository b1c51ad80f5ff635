"""Events about jobs (events.k8s.io/v1): what `kubectl describe` shows.

Called after a status write succeeded. The name is made from the job, the reason and the moment of the transition, so
that the same transition after a crash is the same event. Too many at once are dropped: an event is a hint, the status
is the truth.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from datetime import UTC, datetime
from typing import Any

from posttrain_api import names
from posttrain_operator.actions import Event
from posttrain_operator.cluster import Cluster
from posttrain_operator.cluster.errors import AlreadyExists, ApiError
from posttrain_operator.cluster.kinds import EVENT
from posttrain_operator.records import JobRecord

log = logging.getLogger(__name__)
_RATE, _BURST = 5.0, 50.0
_MAX_NOTE = 1024


class Recorder:
    """Records events one by one, at most 5 a second after a burst of 50."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._tokens, self._filled = _BURST, time.monotonic()
        self._under_way: set[asyncio.Task[None]] = set()

    def record(self, job: JobRecord, event: Event) -> None:
        """Sends one event on its way; nobody waits for it."""
        if not self._allowed():
            log.warning("event dropped, too many at once: %s/%s %s %s", *job.key, event.reason, event.message)
            return
        task = asyncio.create_task(self._write(job, event), name="event")
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _write(self, job: JobRecord, event: Event) -> None:
        """What cannot be written is logged and dropped."""
        body = event_body(job, event, datetime.now(UTC))
        try:
            await self._cluster.create(EVENT, job.key.namespace, body)
        except AlreadyExists:
            log.debug("event exists: %s", body["metadata"]["name"])
        except ApiError as error:
            log.warning("event not written: %s/%s %s: %s", *job.key, event.reason, error)

    def _allowed(self) -> bool:
        now = time.monotonic()
        self._tokens = min(_BURST, self._tokens + (now - self._filled) * _RATE)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def event_body(job: JobRecord, event: Event, moment: datetime) -> dict[str, Any]:
    """The Event. Its name is the same for the same transition: same object version, reason and message."""
    identity = f"{job.uid}/{job.resource_version}/{event.reason}/{event.message}"
    mark = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return {
        "apiVersion": EVENT.api_version,
        "kind": EVENT.kind,
        "metadata": {"name": f"{job.key.name}.{mark}", "namespace": job.key.namespace},
        "eventTime": moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": f"{names.GROUP}/operator",
        "reportingInstance": os.environ.get("HOSTNAME", "operator")[:128],
        "action": "Reconcile",
        "reason": event.reason,
        "type": event.kind,
        "note": event.message[:_MAX_NOTE],
        "regarding": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "namespace": job.key.namespace,
            "name": job.key.name,
            "uid": job.uid,
            "resourceVersion": job.resource_version,
        },
    }
