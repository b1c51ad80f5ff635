"""Sends progress reports to the operator's status server, and can never disturb the training.

The loop and the launcher of rank 0 call `report` as often as they like: it stores the report and returns. A
background thread sends the newest one, at most every few seconds and at least as a heartbeat; another phase, a new
checkpoint and facts said for the first time go out at once. Whatever goes wrong on the way is logged once when it
begins and once when it ends. Where POSTTRAIN_STATUS_URL is unset nothing happens at all.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import random
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from posttrain_api import names
from posttrain_api.records import MAX_METRICS, Report

log = logging.getLogger(__name__)
_FACTS = ("checkpoint", "data_report", "resolved")
_GIVE_UP = 409
"""The job has ended: nothing we say is of use any more."""
_OUR_FAULT = frozenset({400, 413, 422})
"""The server will never take this report; the next one may be better."""


@dataclass(frozen=True)
class ReporterTiming:
    """Seconds: between reports, between urgent ones, between heartbeats, for one request, pauses after failures."""

    interval: float = 5.0
    urgent: float = 1.0
    heartbeat: float = 30.0
    request: float = 10.0
    retry_first: float = 5.0
    retry_most: float = 60.0


@dataclass(frozen=True)
class Endpoint:
    """Where to report: the job's own URL, the CA bundle and the projected token (both change while we run)."""

    url: str
    ca_file: Path | None
    token_file: Path | None


class Reporter:
    """One per process; `report` and `close` may be called from any thread."""

    def __init__(self, endpoint: Endpoint | None, timing: ReporterTiming | None = None) -> None:
        self._endpoint = endpoint
        self._timing = timing or ReporterTiming()
        self._state = threading.Condition()
        self._known: Report | None = None
        self._pending = False
        self._urgent = False
        self._closing = False
        self._stopped = endpoint is None
        self._failures = 0
        self._client = None if endpoint is None else _Client(endpoint, self._timing.request)
        self._thread = threading.Thread(target=self._run, name="posttrain-reporter", daemon=True)
        if endpoint is not None:
            self._thread.start()

    @classmethod
    def from_env(cls, environ: Mapping[str, str], timing: ReporterTiming | None = None) -> Reporter:
        """A reporter as the pod's environment says; one that does nothing where no URL is set."""
        url = environ.get(names.ENV_STATUS_URL, "")
        if url and not url.startswith("https://"):
            log.warning("%s must begin with https:// (found %r): no progress reports", names.ENV_STATUS_URL, url)
        if not url.startswith("https://"):
            return cls(None)
        ca, token = environ.get(names.ENV_STATUS_CA), environ.get(names.ENV_STATUS_TOKEN)
        return cls(Endpoint(url, Path(ca) if ca else None, Path(token) if token else None), timing)

    def report(self, report: Report) -> None:
        """Takes the newest report; never blocks, never raises. Facts told earlier stay in it."""
        report = report.model_copy(update={"metrics": finite_metrics(report.metrics)})
        with self._state:
            if self._stopped or self._closing:
                return
            before, self._known = self._known, _with_facts(self._known, report)
            self._urgent = self._urgent or _is_urgent(before, self._known)
            self._pending = True
            self._state.notify_all()

    def close(self, seconds: float = 5.0) -> None:
        """Sends what is pending and ends the thread; returns after so many seconds at the latest."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds)
        with self._state:
            self._stopped = True  # a request that is still under way is the last

    def _run(self) -> None:
        last_sent, not_before = -math.inf, -math.inf
        while self._wait(last_sent, not_before):
            with self._state:
                report, self._pending, self._urgent = self._known, False, False
            if report is None:
                continue
            pause = self._send(report)
            last_sent = time.monotonic()
            not_before = last_sent + pause
        if self._client is not None:
            self._client.close()

    def _wait(self, last_sent: float, not_before: float) -> bool:
        """Sleeps until a report is due. False: the thread ends."""
        with self._state:
            while not self._stopped:
                if self._closing and not self._pending:
                    return False
                due = self._due(last_sent, not_before)
                left = due - time.monotonic()
                if left <= 0:
                    return True
                self._state.wait(None if math.isinf(left) else left)
            return False

    def _due(self, last_sent: float, not_before: float) -> float:
        """When to send next, on the monotonic clock; infinity while there is nothing to say."""
        if self._known is None:
            return math.inf
        if self._closing:
            return -math.inf
        if self._urgent:
            return max(last_sent + self._timing.urgent, not_before)
        interval = self._timing.interval if self._pending else self._timing.heartbeat
        return max(last_sent + interval, not_before)

    def _send(self, report: Report) -> float:
        """Sends one report. Returns the seconds to wait before the next try: 0 after success."""
        assert self._client is not None  # the thread runs only with an endpoint
        try:
            self._client.post(report)
        except _Refused as error:
            return self._refused(error)
        except (OSError, ValueError, http.client.HTTPException) as error:
            return self._failed(f"{type(error).__name__}: {error}", None)
        if self._failures:
            log.info("progress reports reach the status server again after %d failed tries", self._failures)
        self._failures = 0
        return 0.0

    def _refused(self, error: _Refused) -> float:
        text = str(error)
        if error.code == _GIVE_UP:
            log.info("no more progress reports: %s", text)
            with self._state:
                self._stopped = True
            return 0.0
        if error.code in _OUR_FAULT:
            self._note(text)
            return 0.0
        return self._failed(text, error.retry_after)

    def _failed(self, text: str, retry_after: str | None) -> float:
        """Keeps the report pending and gives the pause: what the server asks for, else doubled, with jitter."""
        self._note(text)
        with self._state:
            self._pending = True
            self._stopped = self._stopped or self._closing  # the last try was this one
        if retry_after and retry_after.isdigit():
            return min(float(retry_after), self._timing.retry_most)
        pause = min(self._timing.retry_most, self._timing.retry_first * 2.0 ** min(self._failures - 1, 10))
        return pause * random.uniform(0.75, 1.25)

    def _note(self, text: str) -> None:
        """Logs the first failure of a row for people, the others for debugging."""
        self._failures += 1
        if self._failures == 1:
            log.warning("a progress report did not reach the status server, training goes on: %s", text)
        else:
            log.debug("progress report failed %d times: %s", self._failures, text)


class _Refused(Exception):
    """The server's answer was not 200. `retry_after`: its wish in seconds, as sent."""

    def __init__(self, code: int, message: str, retry_after: str | None) -> None:
        super().__init__(f"{code} {message}")
        self.code, self.retry_after = code, retry_after


class _Client:
    """One POST at a time over a connection that is kept: a thousand jobs must not cost the operator 200 handshakes/s.

    Token and CA bundle are read again when they change; the pod's HTTP proxies are not used.
    """

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        self._endpoint = endpoint
        self._timeout = timeout
        self._url = urlsplit(endpoint.url)
        self._bundle: str | None = None
        self._connection: http.client.HTTPSConnection | None = None

    def post(self, report: Report) -> None:
        """Sends one report. _Refused, or OSError or HTTPException where no answer came."""
        body, headers = report.to_json().encode(), {"Content-Type": "application/json", **self._authorization()}
        kept = self._connection is not None
        try:
            self._exchange(body, headers)
        except (OSError, http.client.HTTPException):
            self.close()
            if not kept:
                raise
            self._exchange(body, headers)  # a kept connection may have been closed by the other side long ago

    def close(self) -> None:
        """Drops the connection; the next report opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _exchange(self, body: bytes, headers: dict[str, str]) -> None:
        connection = self._connected()
        connection.request("POST", self._url.path, body, headers)
        answer = connection.getresponse()
        text = answer.read(65536)
        if answer.will_close:
            self.close()
        if answer.status != 200:
            raise _Refused(answer.status, _message(text) or answer.reason, answer.headers.get("Retry-After"))

    def _connected(self) -> http.client.HTTPSConnection:
        ca = self._endpoint.ca_file
        bundle = None if ca is None else ca.read_text()
        if self._connection is None or bundle != self._bundle:
            self.close()
            context = ssl.create_default_context(cadata=bundle)
            host, port = self._url.hostname or "", self._url.port
            self._connection = http.client.HTTPSConnection(host, port, timeout=self._timeout, context=context)
            self._bundle = bundle
        return self._connection

    def _authorization(self) -> dict[str, str]:
        if self._endpoint.token_file is None:
            return {}
        return {"Authorization": f"Bearer {self._endpoint.token_file.read_text().strip()}"}


def finite_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """What of a metric dict may go into a Report: finite numbers, at most MAX_METRICS, the first ones kept."""
    finite = [(name, float(value)) for name, value in metrics.items() if math.isfinite(value)]
    return dict(finite[:MAX_METRICS])


def _with_facts(before: Report | None, report: Report) -> Report:
    if before is None:
        return report
    missing = {name: getattr(before, name) for name in _FACTS if getattr(report, name) is None}
    return report.model_copy(update={name: fact for name, fact in missing.items() if fact is not None})


def _is_urgent(before: Report | None, now: Report) -> bool:
    return before is None or any(getattr(before, name) != getattr(now, name) for name in ("phase", *_FACTS))


def _message(body: bytes) -> str:
    """The server's own words, bounded; empty where it has none (a proxy answered)."""
    try:
        found = json.loads(body)
    except ValueError:
        return ""
    return str(found.get("message", ""))[:500] if isinstance(found, dict) else ""
