"""The two routes of the status server: who may report for which job, and what each refusal says.

Called by aiohttp. The order matters: a sender is known before anything about jobs is told, and nothing outside the
sender's own namespace is ever told. A handler does no waiting but the token review; writing is the writer's. Answers
are JSON with `code`, `reason` and `message`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NoReturn

from aiohttp import web

from posttrain_api import names
from posttrain_api.records import MAX_REPORT_BYTES
from posttrain_operator.statusserver.auth import Authenticator, Sender, TokenRefused
from posttrain_operator.statusserver.bodies import BodyError, Incoming, read_kubeflow, read_report
from posttrain_operator.statusserver.limits import RateLimiter
from posttrain_operator.statusserver.view import JobsView
from posttrain_operator.statusserver.writer import JobKey, ProgressWriter

log = logging.getLogger(__name__)
BODY_SECONDS = 10.0
RESULTS = {
    200: "accepted",
    401: "unauthenticated",
    403: "forbidden",
    404: "unknown_job",
    408: "too_slow",
    409: "finished_job",
    413: "too_large",
    422: "invalid",
    429: "rate_limited",
    503: "unavailable",
}
"""Label `result` of posttraining_status_reports_total for each answer."""


@dataclass(frozen=True)
class Refusal(Exception):
    """An answer other than 200. `retry_after`: seconds, for 429 and 503."""

    code: int
    reason: str
    message: str
    retry_after: float | None = None


@dataclass(frozen=True)
class Parts:
    """What the handlers work with. `count` is told the result of every report."""

    auth: Authenticator
    view: JobsView
    writer: ProgressWriter
    per_pod: RateLimiter
    failures: RateLimiter
    count: Callable[[str], None]


def routes(parts: Parts) -> list[web.RouteDef]:
    """The routes of names.STATUS_PATH and names.KUBEFLOW_STATUS_PATH."""
    return [
        web.post(names.STATUS_PATH, _handler(parts, read_report)),
        web.post(names.KUBEFLOW_STATUS_PATH, _handler(parts, read_kubeflow)),
    ]


def _handler(parts: Parts, read: Callable[[bytes], Incoming]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        try:
            incoming = await _take(parts, request, read)
        except Refusal as refusal:
            parts.count(RESULTS[refusal.code])
            return _refused(refusal)
        parts.count(RESULTS[200])
        answer = {"accepted": True, "droppedMetrics": list(incoming.dropped)}
        return web.json_response(answer)

    return handle


async def _take(parts: Parts, request: web.Request, read: Callable[[bytes], Incoming]) -> Incoming:
    """Checks one request and hands its report to the writer. Refusal where it must not."""
    namespace, name = request.match_info["namespace"], request.match_info["name"]
    if (request.content_length or 0) > MAX_REPORT_BYTES:
        _too_large()
    sender = await _authenticate(parts, request)
    if sender.namespace != namespace:
        raise Refusal(403, "OtherNamespace", f"the token is of namespace {sender.namespace}: report to a job there")
    wait = parts.per_pod.take(sender.pod_uid)
    if wait > 0:
        raise Refusal(429, "TooManyReports", "one report every 5 s is enough; wait as Retry-After says", wait)
    uid = _job_uid(parts, sender, name)
    try:
        incoming = read(await _body(request))
    except BodyError as error:
        raise Refusal(422, "InvalidReport", str(error)) from None
    parts.writer.accept(JobKey(namespace, name, uid), incoming)
    return incoming


async def _authenticate(parts: Parts, request: web.Request) -> Sender:
    """The sender. An address that failed often has to wait, so that it cannot make us flood the API server."""
    address = request.remote or "unknown"
    wait = parts.failures.wait(address)
    if wait > 0:
        raise Refusal(429, "TooManyFailures", "too many refused tokens from this address", wait)
    try:
        return await parts.auth.sender(request.headers.get("Authorization"))
    except TokenRefused as error:
        parts.failures.take(address)
        raise Refusal(401, "TokenRefused", str(error)) from None
    except Exception as error:  # noqa: BLE001 - any failure of the API call: the sender is not at fault and comes again
        log.warning("a token could not be reviewed: %s", error)
        raise Refusal(503, "ReviewUnavailable", "the API server does not answer; try again", 5.0) from None


def _job_uid(parts: Parts, sender: Sender, name: str) -> str:
    job = parts.view.job(sender.namespace, name)
    if job is None:
        raise Refusal(404, "UnknownJob", f"there is no PostTrainingJob {name} in namespace {sender.namespace}")
    if sender.pod_uid not in parts.view.pod_uids(sender.namespace, name):
        text = f"pod {sender.pod_name} is not of the current attempt of PostTrainingJob {name}: only those may report"
        raise Refusal(403, "PodNotOfJob", text)
    if job.terminal:
        raise Refusal(409, "JobFinished", f"PostTrainingJob {name} has ended: stop reporting")
    return job.uid


async def _body(request: web.Request) -> bytes:
    """The body, read no further than the limit and no longer than a few seconds. Refusal 413 or 408."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.content.iter_chunked(4096):
                body += chunk
                if len(body) > MAX_REPORT_BYTES:
                    _too_large()
    except TimeoutError:
        raise Refusal(408, "ReportTooSlow", f"body: must arrive within {BODY_SECONDS:.0f} s") from None
    return bytes(body)


def _too_large() -> NoReturn:
    raise Refusal(413, "ReportTooLarge", f"body: at most {MAX_REPORT_BYTES} bytes; send fewer metrics")


def _refused(refusal: Refusal) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"} if refusal.code == 401 else {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(refusal.retry_after)))
    body = {"code": refusal.code, "reason": refusal.reason, "message": refusal.message}
    return web.Response(
        status=refusal.code, headers=headers, text=json.dumps(body) + "\n", content_type="application/json"
    )
