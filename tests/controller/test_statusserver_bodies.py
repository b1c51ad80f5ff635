"""What is read from the two bodies, and what each refusal says."""

import json

import pytest

from posttrain_operator.statusserver.bodies import BodyError, read_kubeflow, read_report


def raw(value: object) -> bytes:
    return json.dumps(value).encode()


def kubeflow(**status: object) -> bytes:
    return raw({"trainerStatus": status})


def test_our_own_report_comes_through() -> None:
    incoming = read_report(raw({"phase": "Training", "step": 3, "totalSteps": 9, "metrics": {"loss": 1.5}}))
    assert (incoming.report.step, incoming.report.total_steps, incoming.report.metrics) == (3, 9, {"loss": 1.5})
    assert incoming.own_clock


def test_a_loss_that_is_not_a_number_costs_the_metric_not_the_report() -> None:
    incoming = read_report(b'{"phase": "Training", "metrics": {"loss": NaN, "grad_norm": Infinity, "lr": 1e-5}}')
    assert incoming.report.metrics == {"lr": 1e-5}
    assert incoming.dropped == ("grad_norm", "loss")


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (b"{", ("body", "JSON")),
        (b"[1]", ("body", "object", "[1]")),
        (b"[" * 5000, ("body", "JSON")),
        (b"\xff\xfe\x00", ("body", "JSON")),
        (raw({"phase": "Sleeping"}), ("phase", "Training", "'Sleeping'")),
        (raw({"phase": "Training", "step": -1}), ("step", "greater than or equal to 0", "-1")),
        (raw({"phase": "Training", "steps": 4}), ("steps", "not permitted", "4")),
        (raw({"phase": "Training", "metrics": [1]}), ("metrics", "object", "[1]")),
        (raw({"phase": "Training", "metrics": {"loss": "low"}}), ("metrics.loss", "number", "'low'")),
        (raw({"phase": "Training", "metrics": {"a\nb": 1}}), ("metrics", "letters", "a\\nb")),
        (raw({"phase": "Training", "metrics": {"a" * 65: 1}}), ("metrics", "64", "aaa")),
        (raw({"phase": "Training", "metrics": {f"m{i}": 1 for i in range(33)}}), ("metrics", "32", "m1")),
        (raw({"phase": "Training", "checkpoint": {"step": 1}}), ("checkpoint.time", "required")),
    ],
)
def test_our_own_body_is_refused_with_field_rule_and_value(body: bytes, parts: tuple[str, ...]) -> None:
    with pytest.raises(BodyError) as caught:
        read_report(body)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert len(str(caught.value)) < 1500


def test_kubeflows_body_as_the_guide_shows_it() -> None:
    body = kubeflow(
        progressPercentage=45,
        estimatedRemainingSeconds=3600,
        metrics=[{"name": "loss", "value": "0.23"}],
        lastUpdatedTime="2026-03-01T12:00:00Z",
        somethingNew={"a": 1},
    )
    incoming = read_kubeflow(body)
    assert (incoming.percent, incoming.report.eta_seconds, incoming.report.metrics) == (45, 3600, {"loss": 0.23})
    assert not incoming.own_clock


def test_transformers_hides_its_position_among_the_metrics() -> None:
    named = {"loss": "2.5", "current_step": "3", "total_steps": "12", "current_epoch": "0.25"}
    metrics = [{"name": name, "value": value} for name, value in named.items()]
    report = read_kubeflow(kubeflow(progressPercentage=25, metrics=metrics)).report
    assert (report.step, report.total_steps, report.epoch, report.metrics) == (3, 12, 0.25, {"loss": 2.5})


def test_an_endless_run_has_no_total() -> None:
    metrics = [{"name": "total_steps", "value": "-1"}, {"name": "current_step", "value": "-5"}]
    report = read_kubeflow(kubeflow(metrics=metrics)).report
    assert (report.total_steps, report.step) == (None, 0)


def test_kubeflows_last_value_of_a_name_holds_and_what_is_no_number_is_dropped() -> None:
    pairs = [("loss", "1"), ("loss", "2"), ("note", "fine"), ("nan", "nan"), ("inf", "-inf"), ("flag", "True")]
    metrics = [{"name": name, "value": value} for name, value in pairs]
    incoming = read_kubeflow(kubeflow(metrics=metrics))
    assert incoming.report.metrics == {"loss": 2.0}
    assert incoming.dropped == ("note", "nan", "inf", "flag")


def test_only_32_of_kubeflows_metrics_are_kept() -> None:
    metrics = [{"name": f"m{i}", "value": str(i)} for i in range(40)]
    incoming = read_kubeflow(kubeflow(metrics=metrics))
    assert len(incoming.report.metrics) == 32
    assert incoming.dropped == tuple(f"m{i}" for i in range(32, 40))


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        (raw({}), ("trainerStatus", "object", "None")),
        (kubeflow(progressPercentage=101), ("progressPercentage", "0 to 100", "101")),
        (kubeflow(progressPercentage="45"), ("progressPercentage", "whole number", "'45'")),
        (kubeflow(progressPercentage=True), ("progressPercentage", "True")),
        (kubeflow(estimatedRemainingSeconds=-1), ("estimatedRemainingSeconds", "-1")),
        (kubeflow(metrics={"loss": 1}), ("metrics", "list")),
        (kubeflow(metrics=[{"value": "1"}]), ("metrics", "name and value")),
        (kubeflow(metrics=["loss"]), ("metrics", "'loss'")),
    ],
)
def test_kubeflows_body_is_refused_where_its_shape_is_wrong(body: bytes, parts: tuple[str, ...]) -> None:
    with pytest.raises(BodyError) as caught:
        read_kubeflow(body)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
