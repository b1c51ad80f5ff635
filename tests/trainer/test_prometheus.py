"""Rank 0's /metrics, scraped over HTTP and read by Prometheus's own parser."""

import json
import logging
import math
import re
import socket
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from posttrain_api import names
from posttrain_api.records import Checkpoint, Report
from posttrain_api.trainer import PreferenceConfig, RewardModelConfig
from posttrain_trainer import loop
from posttrain_trainer.algorithms.preference import Preference
from posttrain_trainer.algorithms.reward_model import RewardModel
from posttrain_trainer.metrics import MetricsFile, read_metrics
from posttrain_trainer.microbatch import collate
from posttrain_trainer.prometheus import ALL_SERIES, PHASES, PREFIX, SERIES, MetricsExporter
from posttrain_trainer.reference import with_reference
from posttrain_trainer.tokenset import Example, TrainingRow

STEP = {
    "loss": 1.2345678901234567,
    "eval_loss": 0.1 + 0.2,
    "learning_rate": 1.0e-5 / 3,
    "num_tokens": 123456789012.0,
    "step_time": 2 / 3,
    "time/data": 1e-7 / 3,
    "time/checkpoint": 12.5,
    "rewards/my secret reward/mean": 1.0,
}


def parsed(text: str) -> dict[tuple[str, str], float]:
    """{(name, phase): value}."""
    families = text_string_to_metric_families(text)
    return {(each.name, each.labels.get("phase", "")): each.value for family in families for each in family.samples}


def scrape(exporter: MetricsExporter) -> dict[tuple[str, str], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=5) as answer:
        return parsed(answer.read().decode())


def test_the_scraped_value_is_the_one_in_metrics_jsonl(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / names.METRICS_FILE, 0)
    exporter = MetricsExporter()
    exporter.serve(0)
    file.write(7, STEP)
    exporter.observe(STEP, 7)
    line = read_metrics(tmp_path / names.METRICS_FILE)[-1]
    found = scrape(exporter)
    exporter.close()
    for series in SERIES:
        if series.source in line:
            assert found[PREFIX + series.name, ""] == line[series.source], series.source
    assert found["posttrain_phase_seconds", "data"] == line["time/data"]
    assert found["posttrain_phase_seconds", "checkpoint"] == line["time/checkpoint"]
    assert found["posttrain_step", ""] == line["step"] == 7


@given(st.floats(allow_nan=False))
def test_every_number_is_exported_exactly(value: float) -> None:
    exporter = MetricsExporter()
    exporter.observe({"loss": value, "num_tokens": abs(value)}, 1)
    found = parsed(generate_latest(exporter.registry).decode())
    assert found["posttrain_loss", ""] == value
    assert found["posttrain_tokens_total", ""] == abs(value)
    if math.isfinite(value):
        assert found["posttrain_loss", ""] == json.loads(json.dumps(value))


def test_no_name_of_a_user_becomes_a_series() -> None:
    exporter = MetricsExporter()
    exporter.observe(STEP, 1)
    text = generate_latest(exporter.registry).decode()
    assert "secret" not in text
    assert {name for name, _ in parsed(text)} <= {PREFIX + series.name for series in ALL_SERIES}
    assert {phase for _, phase in parsed(text)} <= {"", *PHASES}


def test_an_evaluations_values_stay_until_the_next() -> None:
    exporter = MetricsExporter()
    exporter.observe({"loss": 2.0, "eval_loss": 3.0}, 1)
    exporter.observe({"loss": 1.0}, 2)
    found = parsed(generate_latest(exporter.registry).decode())
    assert (found["posttrain_loss", ""], found["posttrain_eval_loss", ""], found["posttrain_step", ""]) == (1, 3, 2)


@pytest.mark.parametrize(
    ("algorithm", "left_out"),
    [
        (Preference("DPO", PreferenceConfig()), {"logps/chosen", "logps/rejected"}),
        (RewardModel(RewardModelConfig()), set()),
    ],
    ids=["Preference", "RewardModel"],
)
def test_what_a_stage_measures_is_exported(algorithm: Preference | RewardModel, left_out: set[str]) -> None:
    row = TrainingRow((Example(np.array([1, 2], "i4"), np.array([0, 1], "u1")),) * 2, {})
    micro, two = collate([row]), torch.zeros(2)
    if isinstance(algorithm, Preference):
        measured = algorithm.measures((two, two, two), with_reference(micro, two))
    else:
        measured = algorithm.measures(two, micro)
    assert set(measured) - {series.source for series in SERIES} == left_out


def test_every_phase_that_is_measured_is_exported() -> None:
    calls = [
        call
        for path in Path(loop.__file__).parent.glob("*.py")
        for call in re.findall(r"\.measure\((.*)\)", path.read_text())
    ]
    assert {name for call in calls for name in re.findall(r'"(\w+)"', call)} == set(PHASES)


def test_nothing_is_exported_before_the_first_step() -> None:
    assert parsed(generate_latest(MetricsExporter().registry).decode()) == {}


def test_the_last_checkpoints_time() -> None:
    exporter = MetricsExporter()
    saved = Checkpoint(step=5, time="2026-01-01T00:00:00.500000Z", uri="pvc://a/b", size_bytes=1, digest="d")
    exporter.report(Report(phase="Training"))
    exporter.report(Report(phase="Training", checkpoint=saved))
    found = parsed(generate_latest(exporter.registry).decode())
    assert found["posttrain_checkpoint_last_success_timestamp_seconds", ""] == 1767225600.5


@pytest.mark.parametrize("environ", [{}, {names.ENV_METRICS_PORT: ""}, {names.ENV_METRICS_PORT: "0"}])
def test_off_unless_a_port_is_given(environ: dict[str, str]) -> None:
    exporter = MetricsExporter.from_env(environ)
    exporter.observe(STEP, 1)
    assert exporter.port is None
    exporter.close()


def test_a_port_in_use_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with caplog.at_level(logging.WARNING):
            exporter = MetricsExporter.from_env({names.ENV_METRICS_PORT: str(port)})
    assert exporter.port is None
    assert f"port {port} cannot be opened" in caplog.text
    exporter.observe(STEP, 1)


def test_a_port_that_is_none_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert MetricsExporter.from_env({names.ENV_METRICS_PORT: "http"}).port is None
    assert "must be a port" in caplog.text


def test_close_frees_the_port() -> None:
    first = MetricsExporter()
    first.serve(0)
    port = first.port
    assert port
    first.close()
    second = MetricsExporter.from_env({names.ENV_METRICS_PORT: str(port)})
    assert second.port == port
    second.close()


def test_names_follow_prometheus_rules() -> None:
    full = [PREFIX + series.name for series in ALL_SERIES]
    assert len(set(full)) == len(full)
    assert all(re.fullmatch(r"posttrain_[a-z_]+", name) for name in full)
    assert all(series.name.endswith("_total") == series.counter for series in ALL_SERIES)
