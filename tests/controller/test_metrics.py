"""The operator's metrics and probes, scraped over HTTP and read by Prometheus's own parser."""

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from posttrain_operator.actions import Actions
from posttrain_operator.brake import Brake
from posttrain_operator.cache import Cache
from posttrain_operator.endpoints import start_http
from posttrain_operator.facts import JobFacts
from posttrain_operator.health import Health
from posttrain_operator.jobseries import JobsCollector, sample_of
from posttrain_operator.metrics import OperatorMetrics
from posttrain_operator.monitoring import Monitoring
from posttrain_operator.plan.types import PlanSettings
from posttrain_operator.records import JobRecord, Key
from posttrain_operator.settings import Settings
from posttrain_operator.slim import job_record
from posttrain_operator.workqueue import Backoff, WorkQueue

T0 = "2026-03-01T12:00:00Z"
T1 = "2026-03-01T12:00:20Z"
T2 = "2026-03-01T14:00:00Z"
NOW = datetime(2026, 3, 1, 14, 5, tzinfo=UTC)
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def record(name: str = "job", status: dict[str, Any] | None = None, version: str = "1", **spec: Any) -> JobRecord:
    metadata = {"namespace": "team", "name": name, "uid": f"uid-{name}", "resourceVersion": version, "generation": 1}
    return job_record({"metadata": metadata, "spec": {"stage": "SFT", **spec}, "status": status or {}})


def condition(kind: str, status: str = "True", since: str = T2, reason: str = "X") -> dict[str, str]:
    return {"type": kind, "status": status, "lastTransitionTime": since, "reason": reason}


def read(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples}


def scrape(metrics: OperatorMetrics) -> Samples:
    return read(generate_latest(metrics.registry).decode())


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"posttraining_{name}", frozenset(labels.items())))


def passed(metrics: OperatorMetrics, before: dict[str, Any], after: dict[str, Any], **spec: Any) -> None:
    metrics.transitioned(JobFacts.of(record(status=before, **spec)), Actions(status=after))


def test_a_job_is_counted_once_when_first_seen() -> None:
    metrics = OperatorMetrics()
    passed(metrics, {}, {"state": "Pending"})
    passed(metrics, {"state": "Pending"}, {"state": "Running"})
    assert value(scrape(metrics), "jobs_created_total", job_namespace="team", stage="SFT") == 1


def test_the_end_of_a_job_is_counted_with_its_cause_and_length() -> None:
    metrics = OperatorMetrics()
    failed = {
        "startTime": T0,
        "completionTime": T2,
        "failure": {"reason": "StorageFull"},
        "conditions": [condition("Finished"), condition("Failed", reason="RestartBudgetExhausted")],
    }
    passed(metrics, {"startTime": T0}, failed)
    passed(metrics, failed, failed)
    samples = scrape(metrics)
    labels = {"job_namespace": "team", "stage": "SFT", "algorithm": "", "result": "Failed", "reason": "StorageFull"}
    assert value(samples, "jobs_finished_total", **labels) == 1
    assert value(samples, "job_duration_seconds_sum", stage="SFT") == 7200
    assert value(samples, "job_duration_seconds_count", stage="SFT") == 1


def test_success_and_unknown_reasons() -> None:
    metrics = OperatorMetrics()
    passed(metrics, {}, {"conditions": [condition("Finished"), condition("Complete")]})
    odd = {"failure": {"reason": "my secret"}, "conditions": [condition("Finished"), condition("Failed")]}
    passed(metrics, {"state": "Running"}, odd)
    labels = {"job_namespace": "team", "stage": "SFT", "algorithm": ""}
    samples = scrape(metrics)
    assert value(samples, "jobs_finished_total", **labels, result="Succeeded", reason="Succeeded") == 1
    assert value(samples, "jobs_finished_total", **labels, result="Failed", reason="Other") == 1


def test_startup_is_the_first_attempts() -> None:
    metrics = OperatorMetrics()
    running = {"startTime": T0, "conditions": [condition("Running", since=T1)], "attempt": {"number": 1}}
    passed(metrics, {"startTime": T0}, running)
    passed(metrics, {"startTime": T0}, {**running, "attempt": {"number": 2}})
    samples = scrape(metrics)
    assert value(samples, "job_startup_seconds_count", stage="SFT") == 1
    assert value(samples, "job_startup_seconds_sum", stage="SFT") == 20


def test_gpu_seconds_are_counted_as_they_grow() -> None:
    metrics = OperatorMetrics()
    passed(metrics, {}, {"usage": {"gpuSeconds": 10}})
    passed(metrics, {"usage": {"gpuSeconds": 10}}, {"usage": {"gpuSeconds": 25}})
    passed(metrics, {"usage": {"gpuSeconds": 25}}, {})
    assert value(scrape(metrics), "gpu_seconds_total", job_namespace="team", stage="SFT") == 25


def test_passes_requests_and_reports() -> None:
    metrics = OperatorMetrics()
    metrics.reconciled(0.02, None)
    metrics.reconciled(0.03, "Conflict")
    metrics.api_request("PATCH", 200, 0.01)
    metrics.api_request("GET", 0, 30.0)
    metrics.status_report("accepted")
    samples = scrape(metrics)
    assert value(samples, "reconcile_duration_seconds_count") == 2
    assert value(samples, "reconcile_errors_total", error="Conflict") == 1
    assert value(samples, "api_requests_total", method="PATCH", code="200") == 1
    assert value(samples, "api_requests_total", method="GET", code="none") == 1
    assert value(samples, "status_reports_total", result="accepted") == 1


def test_jobs_by_state() -> None:
    jobs = [
        record("a", {"state": "Running"}),
        record("b", {"state": "Running"}),
        record("c"),
        record("d", stage="DPO!"),
    ]
    samples = scrape(OperatorMetrics(lambda: jobs))
    assert value(samples, "jobs", job_namespace="team", stage="SFT", state="Running") == 2
    assert value(samples, "jobs", job_namespace="team", stage="SFT", state="Pending") == 1
    assert value(samples, "jobs", job_namespace="team", stage="Other", state="Pending") == 1


def collected(collector: JobsCollector) -> Samples:
    samples = [each for family in collector.collect() for each in family.samples]
    return {(each.name, frozenset(each.labels.items())): each.value for each in samples}


def test_series_of_one_job_live_ten_minutes_longer_than_it() -> None:
    progress = {"percent": 42, "step": 120, "totalSteps": 285, "lastAdvanceTime": "2026-03-01T12:30:00.500Z"}
    status = {"state": "Running", "progress": progress, "restarts": {"total": 2}}
    jobs = [record("job", status)]
    clock = [NOW]
    collector = JobsCollector(lambda: jobs, now=lambda: clock[0])
    who = {"job_namespace": "team", "job_name": "job"}
    first = collected(collector)
    assert value(first, "job_progress_ratio", **who) == 120 / 285
    assert value(first, "job_last_progress_timestamp_seconds", **who) == 1772368200.5
    assert value(first, "job_restarts", **who) == 2
    assert value(first, "job_info", **who, uid="uid-job", stage="SFT", algorithm="") == 1
    jobs[0] = record("job", {**status, "state": "Succeeded", "completionTime": T2}, "2")
    assert value(collected(collector), "job_progress_ratio", **who) == 120 / 285
    clock[0] = NOW + timedelta(minutes=6)
    last = collected(collector)
    assert value(last, "job_progress_ratio", **who) is None
    assert value(last, "jobs", job_namespace="team", stage="SFT", state="Succeeded") == 1


def test_only_percent_or_nothing_is_known() -> None:
    assert sample_of(record("a", {"progress": {"percent": 45}})).ratio == 0.45
    assert sample_of(record("a", {"progress": {"step": 7}})).ratio is None
    assert sample_of(record("a", {"progress": {"step": 70, "totalSteps": 7}})).ratio == 1.0


def test_a_job_is_parsed_once_per_version() -> None:
    parsed: list[str] = []

    class Counted(JobRecord):
        def manifest(self) -> dict[str, Any]:
            parsed.append(self.resource_version)
            return json.loads(self.raw)

    plain = record()
    fields = {name: getattr(plain, name) for name in JobRecord.__slots__}
    jobs = [Counted(**fields)]
    collector = JobsCollector(lambda: jobs)
    collected(collector)
    collected(collector)
    jobs[0] = replace(jobs[0], resource_version="2")
    collected(collector)
    assert parsed == ["1", "2"]
    jobs.clear()
    assert value(collected(collector), "job_restarts", job_namespace="team", job_name="job") is None


def test_no_string_of_a_user_but_namespace_and_name_is_a_label() -> None:
    metrics = OperatorMetrics(lambda: [record("a", {"state": "secret-x"}, stage="secret-y", algorithm="secret-z")])
    passed(metrics, {}, {"conditions": [condition("Finished", reason="secret")]}, stage="secret", algorithm="secret")
    assert "secret" not in generate_latest(metrics.registry).decode()


async def test_the_operators_parts_are_wired_to_the_metrics() -> None:
    monitoring = Monitoring()
    plan = PlanSettings(trainer_image="trainer")
    stop = await monitoring.serve(Settings("ops", plan, metrics_port=None), Health())
    await stop()
    stop = await monitoring.serve(Settings("ops", plan, metrics_port=0), Health())
    await stop()
    cache = Cache()
    cache.put_job(record("a", {"state": "Running"}))
    queue: WorkQueue[Key] = WorkQueue(Backoff(1, 1))
    queue.add(Key("team", "a"))
    brake = Brake()
    brake.pull(100)
    monitoring.follow(cache, queue, brake)
    monitoring.diverged("Pod", "lost", 2)
    monitoring.loop_lag(0.3)
    monitoring.reconciled(0.1, "Conflict")
    monitoring.api_request("GET", 200, 0.1)
    monitoring.reported("accepted")
    monitoring.transitioned(JobFacts.of(record()), Actions(status={"state": "Pending"}))
    samples = scrape(monitoring.metrics)
    assert value(samples, "queue_length") == 1
    assert 0 <= (value(samples, "queue_oldest_seconds") or 0) < 60
    assert 90 < (value(samples, "brake_seconds") or 0) <= 125
    assert value(samples, "cache_divergence_total", kind="Pod", problem="lost") == 2
    assert value(samples, "event_loop_tasks") == len(asyncio.all_tasks())
    assert value(samples, "event_loop_lag_seconds_bucket", le="0.2") == 0
    assert value(samples, "event_loop_lag_seconds_bucket", le="0.5") == 1
    assert value(samples, "cache_divergence_total", kind="PostTrainingJob", problem="behind") == 0
    assert value(samples, "api_request_duration_seconds_count", method="GET") == 1
    assert value(samples, "jobs", job_namespace="team", stage="SFT", state="Running") == 1
    assert value(samples, "jobs_created_total", job_namespace="team", stage="SFT") == 1
    assert value(samples, "reconcile_errors_total", error="Conflict") == 1


async def test_endpoints_say_what_the_operator_knows() -> None:
    health = Health(limit_seconds=60)
    metrics = OperatorMetrics(lambda: [record()])
    server = await start_http(0, metrics.registry, health, "127.0.0.1")
    base = f"http://127.0.0.1:{server.port}"
    async with aiohttp.ClientSession() as client:

        async def get(path: str) -> tuple[int, str]:
            async with client.get(base + path) as answer:
                return answer.status, await answer.text()

        assert (await get("/livez"))[0] == 200
        health.detail = "waits for the list of pods"
        assert await get("/readyz") == (503, "not ready: waits for the list of pods\n")
        health.lists_delivered = True
        assert (await get("/readyz"))[0] == 200
        code, text = await get("/metrics")
        assert code == 200
        assert value(read(text), "jobs", job_namespace="team", stage="SFT", state="Pending") == 1
        assert (await get("/debug"))[0] == 404
        health._limit = 0.0
        assert (await get("/livez"))[0] == 503
    await server.close()


async def test_a_port_in_use_is_an_error() -> None:
    first = await start_http(0, OperatorMetrics().registry, Health(), "127.0.0.1")
    with pytest.raises(OSError, match="address already in use"):
        await start_http(first.port, OperatorMetrics().registry, Health(), "127.0.0.1")
    await first.close()
