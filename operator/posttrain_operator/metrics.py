"""The operator's own Prometheus metrics, in a registry of their own.

The workers, the API client and the status server call the plain methods; `endpoints` serves the registry. No string of
a user's is ever a label value, but for a job's namespace and name; reasons and stages come from closed lists, all else
is "Other". The table of docs/platform/metrics.md is tested against this module.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from posttrain_api.reasons import Reason
from posttrain_operator import clock
from posttrain_operator.actions import Actions
from posttrain_operator.facts import JobFacts
from posttrain_operator.jobseries import OTHER, PREFIX, JobsCollector, algorithm_of, stage_of
from posttrain_operator.records import JobRecord

_JOB_SECONDS = (60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 3 * 86400, 7 * 86400, 30 * 86400)
_STARTUP_SECONDS = (5, 15, 30, 60, 120, 300, 600, 1800, 3600)
_LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 10)
_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 15)
_RECONCILE_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_WATCHED = ("PostTrainingJob", "PyTorchJob", "Pod")
_REASONS = frozenset(reason.value for reason in Reason) | {"Succeeded"}


class OperatorMetrics:
    """One per process. `jobs` gives the cached jobs at each scrape."""

    def __init__(self, jobs: Callable[[], Iterable[JobRecord]] = tuple) -> None:
        self.registry = registry = CollectorRegistry()
        by_stage = ("job_namespace", "stage")
        self._created = _counter(registry, "jobs_created_total", "Jobs seen for the first time", by_stage)
        ended = (*by_stage, "algorithm", "result", "reason")
        self._finished = _counter(registry, "jobs_finished_total", "Jobs that ended", ended)
        self._gpu = _counter(registry, "gpu_seconds_total", "GPUs times the seconds they were held", by_stage)
        self._reports = _counter(registry, "status_reports_total", "Progress reports by their answer", ("result",))
        self._errors = _counter(registry, "reconcile_errors_total", "Passes that failed, by kind of error", ("error",))
        self._requests = _counter(registry, "api_requests_total", "Requests to the API server", ("method", "code"))
        self._duration = _histogram(registry, ("job_duration_seconds", "From start to end"), _JOB_SECONDS, ("stage",))
        startup = ("job_startup_seconds", "Start of a job until its first attempt runs")
        self._startup = _histogram(registry, startup, _STARTUP_SECONDS, ("stage",))
        reconcile = ("reconcile_duration_seconds", "One pass over one job")
        self._reconcile = _histogram(registry, reconcile, _RECONCILE_SECONDS, ())
        info = Gauge(PREFIX + "build_info", "Always 1", ("version", "python"), registry=registry)
        info.labels(_version(), platform.python_version()).set(1)
        request = ("api_request_duration_seconds", "Requests to the API server, until the answer or its absence")
        self._latency = _histogram(registry, request, _REQUEST_SECONDS, ("method",))
        lag = ("event_loop_lag_seconds", "How late the event loop wakes up, ten times a second")
        self.loop_lag = _histogram(registry, lag, _LAG_SECONDS, ()).observe
        tasks = Gauge(PREFIX + "event_loop_tasks", "Tasks of the event loop", registry=registry)
        self.loop_tasks = tasks.set_function
        problem = ("kind", "problem")
        self._divergence = _counter(registry, "cache_divergence_total", "Objects that no watch has told of", problem)
        for kind, what in itertools.product(_WATCHED, ("lost", "behind")):
            self._divergence.labels(kind, what)
        self._queue = Gauge(PREFIX + "queue_length", "Jobs that wait for a worker", registry=registry)
        waited = "Seconds that the job longest in the queue has waited"
        self._waited = Gauge(PREFIX + "queue_oldest_seconds", waited, registry=registry)
        brake = "Seconds that all workers still rest, because the API server asked for it or does not answer"
        self._brake = Gauge(PREFIX + "brake_seconds", brake, registry=registry)
        self._leader = Gauge(PREFIX + "leader", "1 where this replica leads, else 0", registry=registry)
        changes = "How often the leader has changed, as the lease says it"
        self._transitions = Gauge(PREFIX + "lease_transitions", changes, registry=registry)
        asked = "Requests for the lease: read, written, conflict or failed"
        self._lease = _counter(registry, "lease_requests_total", asked, ("result",))
        registry.register(JobsCollector(jobs))
        ProcessCollector(registry=registry)

    def reconciled(self, seconds: float, error: str | None) -> None:
        """A worker's pass took so long and ended well (None) or with this kind of error."""
        self._reconcile.observe(seconds)
        if error is not None:
            self._errors.labels(error).inc()

    def api_request(self, method: str, code: int, seconds: float) -> None:
        """A request to the API server; code 0: no answer came. The signature is cluster.api's Observer."""
        self._requests.labels(method, str(code) if code else "none").inc()
        self._latency.labels(method).observe(seconds)

    def diverged(self, kind: str, problem: str, objects: int) -> None:
        """A comparison of the cache with the cluster; `problem` is lost or behind."""
        self._divergence.labels(kind, problem).inc(objects)

    def follow(self, length: Callable[[], int], waited: Callable[[], float], rest: Callable[[], float]) -> None:
        """What is asked at each scrape: the queue's length, the wait of its oldest in seconds, the brake's rest."""
        self._queue.set_function(length)
        self._waited.set_function(waited)
        self._brake.set_function(rest)

    def lease_asked(self, result: str) -> None:
        """A request for the lease ended so."""
        self._lease.labels(result).inc()

    def lease_stands(self, leads: bool, transitions: int) -> None:
        """After each request for the lease."""
        self._leader.set(leads)
        self._transitions.set(transitions)

    def status_report(self, result: str) -> None:
        """A progress report; `result` is one of statusserver.handlers.RESULTS."""
        self._reports.labels(result).inc()

    def transitioned(self, job: JobFacts, actions: Actions) -> None:
        """A status was written: counts what became true with it. Call it once per write, after it succeeded."""
        new = actions.status
        if new is None:
            return
        stage = stage_of(job.spec)
        if not job.status:
            self._created.labels(job.key.namespace, stage).inc()
        if _turned(job, new, "Running") and (new.get("attempt") or {}).get("number", 1) == 1:
            self._observe(self._startup, stage, new.get("startTime"), _since(new, "Running"))
        if _turned(job, new, "Finished"):
            result = "Succeeded" if _holds(new, "Complete") else "Failed"
            labels = (job.key.namespace, stage, algorithm_of(job.spec), result, _reason(result, new))
            self._finished.labels(*labels).inc()
            self._observe(self._duration, stage, new.get("startTime"), new.get("completionTime"))
        used = _gpu_seconds(new) - _gpu_seconds(job.status)
        if used > 0:
            self._gpu.labels(job.key.namespace, stage).inc(used)

    def _observe(self, histogram: Histogram, stage: str, start: str | None, end: str | None) -> None:
        begun, ended = clock.parse(start), clock.parse(end)
        if begun is not None and ended is not None:
            histogram.labels(stage).observe(max(0.0, (ended - begun).total_seconds()))


def _counter(registry: CollectorRegistry, name: str, text: str, labels: tuple[str, ...]) -> Counter:
    return Counter(PREFIX + name, text, labels, registry=registry)


def _histogram(
    registry: CollectorRegistry, what: tuple[str, str], buckets: tuple[float, ...], labels: tuple[str, ...]
) -> Histogram:
    return Histogram(PREFIX + what[0], what[1], labels, buckets=buckets, registry=registry)


def _version() -> str:
    try:
        return version("posttrain")
    except PackageNotFoundError:
        return "unknown"


def _condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next((each for each in status.get("conditions") or () if each.get("type") == kind), {})


def _holds(status: Mapping[str, Any], kind: str) -> bool:
    return _condition(status, kind).get("status") == "True"


def _turned(job: JobFacts, new: Mapping[str, Any], kind: str) -> bool:
    return _holds(new, kind) and not job.holds(kind)


def _since(status: Mapping[str, Any], kind: str) -> str | None:
    return _condition(status, kind).get("lastTransitionTime")


def _reason(result: str, status: Mapping[str, Any]) -> str:
    """Why it failed: the cause where one is known (an exhausted budget has one), else the condition's reason."""
    if result == "Succeeded":
        return "Succeeded"
    found = (status.get("failure") or {}).get("reason") or _condition(status, "Failed").get("reason")
    return found if found in _REASONS else OTHER


def _gpu_seconds(status: Mapping[str, Any]) -> float:
    return float((status.get("usage") or {}).get("gpuSeconds") or 0)
