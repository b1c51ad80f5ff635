"""The routes of the status server: who may report for which job, and what each refusal says.

Called by aiohttp. The order matters: a sender is known before anything about jobs is told, and nothing outside the
sender's own namespace is ever told. A handler does no waiting but the token review; writing is the writer's. Answers
are JSON with `code`, `reason` and `message`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import textwrap
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from aiohttp import web

from posttrain_api import names
from posttrain_api.records import MAX_REPORT_BYTES, MAX_WHERE
from posttrain_operator.statusserver.auth import Authenticator, Sender, TokenRefused
from posttrain_operator.statusserver.bodies import BodyError, Incoming, printable, read_kubeflow, read_report
from posttrain_operator.statusserver.limits import RateLimiter
from posttrain_operator.statusserver.view import JobsView, JobView
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
    """The routes of names.STATUS_PATH and its neighbours, and of names.KUBEFLOW_STATUS_PATH."""
    beside = names.STATUS_PATH.rpartition("/")[0]
    return [
        web.post(names.STATUS_PATH, _handler(parts, _report)),
        web.post(f"{beside}/{names.STATUS_HEARTBEAT}", _handler(parts, _heartbeat)),
        web.post(f"{beside}/{names.STATUS_STACKS}/{{rank}}", _handler(parts, _stacks)),
        web.post(names.KUBEFLOW_STATUS_PATH, _handler(parts, _kubeflow)),
    ]


@dataclass(frozen=True)
class Accepted:
    """A request whose sender may speak for the job."""

    parts: Parts
    sender: Sender
    key: JobKey
    job: JobView
    request: web.Request


def _handler(
    parts: Parts, act: Callable[[Accepted], Awaitable[dict[str, Any]]]
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        try:
            answer = await act(await _accept(parts, request))
        except Refusal as refusal:
            parts.count(RESULTS[refusal.code])
            return _refused(refusal)
        parts.count(RESULTS[200])
        return web.json_response({"accepted": True, **answer})

    return handle


async def _accept(parts: Parts, request: web.Request) -> Accepted:
    """Checks who sends. Refusal where it must not."""
    namespace, name = request.match_info["namespace"], request.match_info["name"]
    if (request.content_length or 0) > MAX_REPORT_BYTES:
        _too_large()
    sender = await _authenticate(parts, request)
    if sender.namespace != namespace:
        raise Refusal(403, "OtherNamespace", f"the token is of namespace {sender.namespace}: report to a job there")
    wait = parts.per_pod.take(sender.pod_uid)
    if wait > 0:
        raise Refusal(429, "TooManyReports", "one report every 5 s is enough; wait as Retry-After says", wait)
    await _look(parts, sender, name)
    job = _job(parts, sender, name)
    return Accepted(parts, sender, JobKey(namespace, name, job.uid), job, request)


async def _report(accepted: Accepted) -> dict[str, Any]:
    return {**await _written(accepted, read_report), **_wishes(accepted.job)}


async def _kubeflow(accepted: Accepted) -> dict[str, Any]:
    return await _written(accepted, read_kubeflow)


async def _heartbeat(accepted: Accepted) -> dict[str, Any]:
    await _body(accepted.request)
    return _wishes(accepted.job)


def _wishes(job: JobView) -> dict[str, Any]:
    """What the operator wants of a pod; every replica reads it from the job's status."""
    return {"dump": job.dump, "stallSeconds": job.stall_seconds}


async def _written(accepted: Accepted, read: Callable[[bytes], Incoming]) -> dict[str, Any]:
    try:
        incoming = read(await _body(accepted.request))
    except BodyError as error:
        raise Refusal(422, "InvalidReport", str(error)) from None
    accepted.parts.writer.accept(accepted.key, incoming)
    return {"droppedMetrics": list(incoming.dropped)}


async def _stacks(accepted: Accepted) -> dict[str, Any]:
    """A rank's stacks: their first line into the status, the whole into our log."""
    if not accepted.job.dump:
        raise Refusal(409, "NotAsked", "stacks are taken only from a job that stands still")
    rank = accepted.request.match_info["rank"]
    if not (rank.isascii() and rank.isdigit()) or int(rank) >= 2**31:
        raise Refusal(422, "InvalidReport", f"rank: must be a number from 0 to {2**31 - 1}; found {ascii(rank)[:80]}")
    text = printable((await _body(accepted.request)).decode(errors="replace"))
    where = text.partition("\n")[0].strip()[:MAX_WHERE] or "nothing was sent"
    if accepted.parts.writer.accept_stacks(accepted.key, int(rank), where):
        place = f"{accepted.key.namespace}/{accepted.key.name}: rank {int(rank)} in pod {accepted.sender.pod_name}"
        log.warning("%s stands still\n%s", place, textwrap.indent(text, "    "))
    return {}


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


async def _look(parts: Parts, sender: Sender, name: str) -> None:
    try:
        await parts.view.look(sender.namespace, name, (sender.pod_name, sender.pod_uid))
    except Exception as error:  # noqa: BLE001 - as above: the sender comes again
        log.warning("job %s/%s could not be looked up: %s", sender.namespace, name, error)
        raise Refusal(503, "ReviewUnavailable", "the API server does not answer; try again", 5.0) from None


def _job(parts: Parts, sender: Sender, name: str) -> JobView:
    job = parts.view.job(sender.namespace, name)
    if job is None:
        raise Refusal(404, "UnknownJob", f"there is no PostTrainingJob {name} in namespace {sender.namespace}")
    if sender.pod_uid not in parts.view.pod_uids(sender.namespace, name):
        text = f"pod {sender.pod_name} is not of the current attempt of PostTrainingJob {name}: only those may report"
        raise Refusal(403, "PodNotOfJob", text)
    if job.terminal:
        raise Refusal(409, "JobFinished", f"PostTrainingJob {name} has ended: stop reporting")
    return job


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
