"""The alerts ask for metrics that the operator has, and the docs say what each of them means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from posttrain_operator.metrics import OperatorMetrics

PAGE = Path(__file__).parents[2] / "docs" / "platform" / "api-faults.md"
Object = dict[str, Any]


def rules(render: Any) -> list[Object]:
    (rule,) = [each for each in render("metrics.alerts.enabled=true") if each["kind"] == "PrometheusRule"]
    (group,) = rule["spec"]["groups"]
    return list(group["rules"])


def test_no_alerts_unless_asked_for(default: list[Object]) -> None:
    assert not [each for each in default if each["kind"] == "PrometheusRule"]


def test_every_metric_of_an_alert_exists(render: Any) -> None:
    families = OperatorMetrics().registry.collect()
    known = {each.name for each in families} | {"posttraining_job_last_progress_timestamp_seconds"}
    for rule in rules(render):
        asked = set(re.findall(r"posttraining_\w+", rule["expr"]))
        assert asked, rule["alert"]
        assert {re.sub(r"_(total|bucket)$", "", name) for name in asked} <= known, rule["alert"]


def test_every_alert_says_what_it_is_and_what_to_do(render: Any) -> None:
    page = PAGE.read_text()
    for rule in rules(render):
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert f"| {rule['alert']} |" in page, rule["alert"]


def test_labels_of_the_cluster_reach_the_rule(render: Any) -> None:
    objects = render("metrics.alerts.enabled=true", 'metrics.alerts.labels={"release":"prometheus"}')
    (rule,) = [each for each in objects if each["kind"] == "PrometheusRule"]
    assert rule["metadata"]["labels"]["release"] == "prometheus"
