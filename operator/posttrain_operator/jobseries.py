"""Prometheus series about single jobs, read from the cache at each scrape.

Level-triggered like everything else here: no series is ever set or deleted, so none can be forgotten. Series with a
job's name exist while the job is active and ten minutes longer, so that the last values are scraped. A job is parsed
again only when it changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, get_args

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from posttrain_api.status.parts import State
from posttrain_operator import clock
from posttrain_operator.records import JobRecord

PREFIX = "posttraining_"
OTHER = "Other"
LINGER_SECONDS = 600.0
_STAGES = frozenset({"Pretrain", "SFT", "RewardModel", "Preference", "RL"})
_ALGORITHMS = frozenset({"DPO", "IPO", "Hinge", "RobustDPO", "APOZero", "APODown", "SimPO", "GRPO", "PPO", "RLOO"})
_STATES = frozenset(get_args(State))


@dataclass(frozen=True)
class JobSample:
    """What the series need of one job. `ended`: completionTime."""

    namespace: str
    name: str
    uid: str
    stage: str
    algorithm: str
    state: str
    ended: datetime | None
    ratio: float | None
    advanced: float | None
    restarts: int


def stage_of(spec: Mapping[str, Any]) -> str:
    """The stage, from the closed list."""
    return spec["stage"] if spec.get("stage") in _STAGES else OTHER


def algorithm_of(spec: Mapping[str, Any]) -> str:
    """The algorithm, from the closed list; empty where the stage has none."""
    named = spec.get("algorithm")
    if not named:
        return ""
    return named if named in _ALGORITHMS else OTHER


def sample_of(record: JobRecord) -> JobSample:
    """Reads a cached job."""
    manifest = record.manifest()
    spec, status = manifest["spec"], manifest["status"]
    progress = status.get("progress") or {}
    advanced = clock.parse(progress.get("lastAdvanceTime"))
    percent = progress.get("percent")
    step, total = progress.get("step"), progress.get("totalSteps")
    ratio = min(1.0, step / total) if step is not None and total else None if percent is None else percent / 100
    state = status.get("state", "Pending")
    return JobSample(
        namespace=record.key.namespace,
        name=record.key.name,
        uid=record.uid,
        stage=stage_of(spec),
        algorithm=algorithm_of(spec),
        state=state if state in _STATES else OTHER,
        ended=clock.parse(status.get("completionTime")),
        ratio=ratio,
        advanced=None if advanced is None else advanced.timestamp(),
        restarts=int((status.get("restarts") or {}).get("total") or 0),
    )


class JobsCollector(Collector):
    """Jobs by state, and the series of active jobs."""

    def __init__(
        self,
        jobs: Callable[[], Iterable[JobRecord]],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        linger: float = LINGER_SECONDS,
    ) -> None:
        self._jobs = jobs
        self._now = now
        self._linger = linger
        self._parsed: dict[str, tuple[str, JobSample]] = {}

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: registering must not read the cache."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Everything at this moment."""
        samples = self._samples()
        yield from _by_state(samples)
        yield from _of_jobs([each for each in samples if self._shown(each)])

    def _samples(self) -> list[JobSample]:
        before, self._parsed = self._parsed, {}
        for record in list(self._jobs()):
            known = before.get(record.uid)
            fresh = known is not None and known[0] == record.resource_version
            self._parsed[record.uid] = known if known and fresh else (record.resource_version, sample_of(record))
        return [sample for _, sample in self._parsed.values()]

    def _shown(self, sample: JobSample) -> bool:
        return sample.ended is None or (self._now() - sample.ended).total_seconds() < self._linger


def _by_state(samples: Iterable[JobSample]) -> Iterator[Metric]:
    counts = Counter((each.namespace, each.stage, each.state) for each in samples)
    family = GaugeMetricFamily(PREFIX + "jobs", "Jobs by state", labels=["job_namespace", "stage", "state"])
    for labels, count in sorted(counts.items()):
        family.add_metric(labels, count)
    yield family


def _of_jobs(samples: Iterable[JobSample]) -> Iterator[Metric]:
    who = ["job_namespace", "job_name"]
    info = GaugeMetricFamily(PREFIX + "job_info", "Always 1", labels=[*who, "uid", "stage", "algorithm"])
    ratio = GaugeMetricFamily(PREFIX + "job_progress_ratio", "Share of the steps that is done, 0 to 1", labels=who)
    advanced = GaugeMetricFamily(
        PREFIX + "job_last_progress_timestamp_seconds", "When the training loop last got on, Unix time", labels=who
    )
    restarts = GaugeMetricFamily(PREFIX + "job_restarts", "Restarts of all its pods so far", labels=who)
    for each in samples:
        labels = [each.namespace, each.name]
        info.add_metric([*labels, each.uid, each.stage, each.algorithm], 1)
        restarts.add_metric(labels, each.restarts)
        if each.ratio is not None:
            ratio.add_metric(labels, each.ratio)
        if each.advanced is not None:
            advanced.add_metric(labels, each.advanced)
    yield from (info, ratio, advanced, restarts)
