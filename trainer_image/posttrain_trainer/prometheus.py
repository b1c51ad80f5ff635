"""Rank 0's /metrics: the numbers of metrics.jsonl for Prometheus, unrounded.

The recorder hands over each step's metrics (`observe`) and each report (`report`). Only names of the table are
exported: what a user calls a metric never becomes a series. Values that a step does not have (an evaluation's) stay
as they were; one scrape never mixes two steps otherwise. A port that cannot be opened is a warning, not a failed
training.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from posttrain_api import names
from posttrain_api.records import Report

log = logging.getLogger(__name__)
PREFIX = "posttrain_"


@dataclass(frozen=True)
class Series:
    """One exported metric: the name in metrics.jsonl, the name for Prometheus without prefix, its help text."""

    source: str
    name: str
    help: str
    counter: bool = False


SERIES = (
    Series("loss", "loss", "Training loss of the step"),
    Series("eval_loss", "eval_loss", "Loss on the evaluation set: per counted token, or per pair"),
    Series("learning_rate", "learning_rate", "Learning rate of the step"),
    Series("grad_norm", "grad_norm", "Norm of the gradient before clipping"),
    Series("epoch", "epoch", "Passes over the training data so far"),
    Series("num_tokens", "tokens_total", "Tokens trained on since the job began", counter=True),
    Series("step_time", "step_duration_seconds", "Seconds of the step"),
    Series("tokens_per_second", "tokens_per_second", "Tokens per second of all ranks together"),
    Series("memory_bytes", "memory_bytes", "Peak memory of rank 0: of the accelerator, else of the process"),
    Series("skipped_steps", "skipped_steps", "Optimizer steps of this step that were skipped"),
    Series("mean_token_accuracy", "mean_token_accuracy", "Share of counted tokens predicted right"),
    Series("entropy", "entropy", "Mean entropy of the prediction over counted tokens, nats"),
    Series("eval_mean_token_accuracy", "eval_mean_token_accuracy", "Share of counted tokens right, evaluation set"),
    Series("eval_entropy", "eval_entropy", "Mean entropy of the prediction, evaluation set, nats"),
    Series("rewards/accuracies", "reward_accuracy", "Preference: share of pairs with the chosen answer above"),
    Series("rewards/margins", "reward_margin", "Preference: mean reward of the chosen answers above the rejected ones"),
    Series("rewards/chosen", "reward_chosen", "Preference: mean reward of the chosen answers"),
    Series("rewards/rejected", "reward_rejected", "Preference: mean reward of the rejected answers"),
    Series("eval_rewards/accuracies", "eval_reward_accuracy", "Preference: that share in the evaluation set"),
    Series("eval_rewards/margins", "eval_reward_margin", "Preference: that mean in the evaluation set"),
    Series("accuracy", "accuracy", "RewardModel: share of pairs with the chosen answer above"),
    Series("margin", "margin", "RewardModel: mean score of the chosen answers above the rejected ones"),
    Series("mean_reward", "mean_reward", "RewardModel: mean score"),
    Series("eval_accuracy", "eval_accuracy", "RewardModel: that share in the evaluation set"),
    Series("eval_margin", "eval_margin", "RewardModel: that mean in the evaluation set"),
    Series("reward", "reward", "RL: mean reward of the rollout's completions"),
    Series("reward_std", "reward_std", "RL: standard deviation of rewards over all completions"),
    Series("frac_reward_zero_std", "reward_zero_std_ratio", "RL: share of groups whose rewards are all the same"),
    Series("eval_reward", "eval_reward", "RL: mean reward on the evaluation set"),
    Series("kl", "kl", "RL: KL divergence from the reference, per token"),
    Series("objective/kl", "kl_per_completion", "PPO: KL divergence from the reference, per completion"),
    Series("clip_ratio/region_mean", "clip_ratio", "GRPO, RLOO: share of ratios that were clipped"),
    Series("policy/clipfrac_avg", "policy_clip_ratio", "PPO: share of tokens whose probability ratio was clipped"),
    Series("critic/loss", "critic_loss", "PPO: loss of the critic"),
    Series("val/explained_variance", "critic_explained_variance", "PPO: share of the returns' variance it explains"),
    Series("completions/mean_length", "completion_length", "RL: mean completion, tokens"),
    Series("completions/clipped_ratio", "completions_truncated_ratio", "RL: share of completions that did not end"),
    Series("sampling/sampling_logp_difference/mean", "sampling_logp_difference", "RL: trainer against rollout engine"),
)
PHASES = (
    *("data", "rollout", "reward", "reference", "scoring", "forward_backward", "optimizer", "evaluation"),
    "checkpoint",
)
"""`time/<phase>` of metrics.jsonl becomes posttrain_phase_seconds{phase="<phase>"}."""
STEP = Series("step", "step", "Optimizer steps done")
PHASE_SECONDS = Series("time/<phase>", "phase_seconds", "Seconds of the step by phase")
CHECKPOINT_TIME = Series(
    "", "checkpoint_last_success_timestamp_seconds", "When the last checkpoint was committed, Unix time"
)
ALL_SERIES = (*SERIES, STEP, PHASE_SECONDS, CHECKPOINT_TIME)


class MetricsExporter(Collector):
    """Holds the latest values; scraped from another thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        self._lock = threading.Lock()
        self._values: dict[str, float] = {}
        self._server: tuple[WSGIServer, threading.Thread] | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> MetricsExporter:
        """An exporter that serves on POSTTRAIN_METRICS_PORT; it does not serve where that is unset, 0 or taken."""
        exporter = cls()
        text = environ.get(names.ENV_METRICS_PORT) or "0"
        if not text.isdigit() or int(text) > 65535:
            log.warning("%s must be a port (found %r): no Prometheus metrics", names.ENV_METRICS_PORT, text)
        elif int(text):
            exporter.serve(int(text))
        return exporter

    def serve(self, port: int) -> None:
        """Listens on every address of the pod (0: any free port)."""
        for address in ("::", "0.0.0.0"):
            try:
                self._server = start_http_server(port, address, self.registry)
            except OSError as error:
                reason = error
            else:
                return
        log.warning("port %d cannot be opened (%s): no Prometheus metrics, training goes on", port, reason)

    @property
    def port(self) -> int | None:
        """The port it serves on; None where it does not."""
        return None if self._server is None else self._server[0].server_port

    def observe(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes a step's metrics: all of them become visible together."""
        fresh = {name: float(value) for name, value in metrics.items()}
        with self._lock:
            self._values = {**self._values, **fresh, STEP.source: float(step)}

    def report(self, report: Report) -> None:
        """Takes the last checkpoint's time from a progress report."""
        if report.checkpoint is not None:
            seconds = datetime.fromisoformat(report.checkpoint.time).timestamp()
            with self._lock:
                self._values = {**self._values, CHECKPOINT_TIME.name: seconds}

    def close(self) -> None:
        """Stops serving."""
        if self._server is not None:
            server, thread = self._server
            self._server = None
            server.shutdown()
            server.server_close()
            thread.join(1.0)

    def collect(self) -> Iterator[Metric]:
        """The values of this moment, for one scrape."""
        with self._lock:
            values = self._values
        for series in (*SERIES, STEP):
            if series.source in values:
                kind = CounterMetricFamily if series.counter else GaugeMetricFamily
                yield kind(PREFIX + series.name, series.help, value=values[series.source])
        phases = GaugeMetricFamily(PREFIX + PHASE_SECONDS.name, PHASE_SECONDS.help, labels=["phase"])
        for phase in PHASES:
            if f"time/{phase}" in values:
                phases.add_metric([phase], values[f"time/{phase}"])
        yield phases
        if CHECKPOINT_TIME.name in values:
            yield GaugeMetricFamily(
                PREFIX + CHECKPOINT_TIME.name, CHECKPOINT_TIME.help, value=values[CHECKPOINT_TIME.name]
            )
