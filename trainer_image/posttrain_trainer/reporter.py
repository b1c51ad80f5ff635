"""Speaks for a pod with the operator's status server, and can never disturb the training.

Owned by the launcher: on the first node it sends the reports that rank 0 leaves, on every other one heartbeats.
`report` may be called as often as one likes: it stores the report and returns. A background thread sends the newest
one, at most every few seconds and at least as a heartbeat; another phase, a new checkpoint and facts said for the first
time go out at once, and so do stacks. What the operator wishes comes back with the answers (`wishes`). Whatever goes
wrong on the way is logged once when it begins and once when it ends. Where POSTTRAIN_STATUS_URL is unset nothing
happens at all.
"""

from __future__ import annotations

import http.client
import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain_api import names
from posttrain_api.records import Report
from posttrain_trainer.signs import finite_metrics
from posttrain_trainer.status_client import Client, Endpoint, Message, Refused

log = logging.getLogger(__name__)
_FACTS = ("checkpoint", "data_report", "resolved")
_HEARTBEAT = Message(names.STATUS_HEARTBEAT, b"{}")
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
class Wishes:
    """What the operator last answered. `dump`: the stacks of this pod's ranks, because the job stands still."""

    dump: bool = False
    stall_seconds: int | None = None
    """runPolicy.stallSeconds as it is now; None: not told."""


class Reporter:
    """One per pod; every method may be called from any thread."""

    def __init__(self, endpoint: Endpoint | None, timing: ReporterTiming | None = None) -> None:
        self.wishes = Wishes()
        self._timing = timing or ReporterTiming()
        self._state = threading.Condition()
        self._known: Report | None = None
        self._beating = False
        self._pending = False
        self._urgent = False
        self._advanced: float | None = None
        self._outbox: deque[Message] = deque()
        self._closing = False
        self._stopped = endpoint is None
        self._failures = 0
        self._client = None if endpoint is None else Client(endpoint, self._timing.request)
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

    @property
    def has_server(self) -> bool:
        """Whether there is anybody to report to, reachable or not."""
        return self._client is not None

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

    def beat(self) -> None:
        """From now on heartbeats, of a pod that has nothing to report; the first goes out at once."""
        with self._state:
            self._beating = self._pending = self._urgent = True
            self._state.notify_all()

    def advanced(self, moment: float | None) -> None:
        """On the monotonic clock, when the loop got on for the last time: said with every report."""
        self._advanced = moment

    def stacks(self, rank: int, text: str) -> None:
        """Sends a rank's stacks at once, and again until the server has them or does not want them."""
        message = Message(f"{names.STATUS_STACKS}/{rank}", text.encode(), "text/plain; charset=utf-8")
        with self._state:
            if not self._stopped:
                self._outbox.append(message)
                self._urgent = True
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
            pause = self._send()
            last_sent = time.monotonic()
            not_before = last_sent + pause
        if self._client is not None:
            self._client.close()

    def _wait(self, last_sent: float, not_before: float) -> bool:
        """Sleeps until something is due. False: the thread ends."""
        with self._state:
            while not self._stopped:
                if self._closing and not self._pending and not self._outbox:
                    return False
                due = self._due(last_sent, not_before)
                left = due - time.monotonic()
                if left <= 0:
                    return True
                self._state.wait(None if math.isinf(left) else left)
            return False

    def _due(self, last_sent: float, not_before: float) -> float:
        """When to send next, on the monotonic clock; infinity while there is nothing to say."""
        if self._known is None and not self._beating:
            return math.inf
        if self._closing:
            return -math.inf
        if self._urgent or self._outbox:
            return max(last_sent + self._timing.urgent, not_before)
        return max(last_sent + (self._timing.interval if self._pending else self._heartbeat()), not_before)

    def _heartbeat(self) -> float:
        """Several in the time after which a job counts as hanging."""
        stall = self.wishes.stall_seconds
        return self._timing.heartbeat if stall is None else min(self._timing.heartbeat, max(1.0, stall / 4))

    def _next(self) -> tuple[Message, bool]:
        """What to send, and whether it is the report (or heartbeat): stacks go first."""
        with self._state:
            if self._outbox:
                return self._outbox[0], False
            report, self._pending, self._urgent = self._known, False, False
        if report is None:
            return _HEARTBEAT, True
        if self._advanced is not None:
            report = report.model_copy(update={"idle_seconds": max(0.0, time.monotonic() - self._advanced)})
        return Message("", report.to_json().encode()), True

    def _send(self) -> float:
        """Sends one message. Returns the seconds to wait before the next try: 0 after success."""
        assert self._client is not None  # the thread runs only with an endpoint
        message, is_report = self._next()
        try:
            answer = self._client.post(message)
        except Refused as error:
            return self._refused(error, is_report)
        except (OSError, ValueError, http.client.HTTPException) as error:
            return self._failed(f"{type(error).__name__}: {error}", None)
        if self._failures:
            log.info("progress reports reach the status server again after %d failed tries", self._failures)
        self._failures = 0
        if is_report:
            self.wishes = _wishes(answer)
        else:
            self._sent_stacks()
        return 0.0

    def _sent_stacks(self) -> None:
        with self._state:
            self._outbox.popleft()

    def _refused(self, error: Refused, is_report: bool) -> float:
        text = str(error)
        if not is_report and error.code in {_GIVE_UP, *_OUR_FAULT}:
            self._sent_stacks()  # nobody asks for them any more
            return 0.0
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


def _wishes(answer: Mapping[str, Any]) -> Wishes:
    stall = answer.get("stallSeconds")
    return Wishes(answer.get("dump") is True, stall if isinstance(stall, int) and stall > 0 else None)


def _with_facts(before: Report | None, report: Report) -> Report:
    if before is None:
        return report
    missing = {name: getattr(before, name) for name in _FACTS if getattr(report, name) is None}
    return report.model_copy(update={name: fact for name, fact in missing.items() if fact is not None})


def _is_urgent(before: Report | None, now: Report) -> bool:
    return before is None or any(getattr(before, name) != getattr(now, name) for name in ("phase", "warning", *_FACTS))
