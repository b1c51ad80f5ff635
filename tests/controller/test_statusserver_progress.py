"""status.progress from reports: pure functions, time given."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain_api.records import MAX_METRICS, Best, Checkpoint, DataReport, Report, Resolved, Warned
from posttrain_api.status.progress import Progress
from posttrain_operator.statusserver import progress
from posttrain_operator.statusserver.bodies import Incoming

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
CHECKPOINT = Checkpoint(step=100, time="2026-03-01T11:59:00Z", uri="pvc://runs/a", size_bytes=5, digest="sha256:0")


def incoming(**fields: object) -> Incoming:
    return Incoming(Report(**{"phase": "Training", **fields}))


def test_a_running_job_reads_like_a_progress_bar() -> None:
    report = incoming(step=120, total_steps=285, metrics={"loss": 1.23449, "tokens_per_second": 12345.0})
    written = progress.advance(None, report, NOW)
    assert written["percent"] == 42
    assert written["display"] == "42 % 120/285"
    assert written["headline"] == "loss 1.234, 12.3k tok/s"
    assert written["metrics"] == [
        {"name": "loss", "value": "1.23449"},
        {"name": "tokens_per_second", "value": "12345.0"},
    ]
    assert written["lastUpdateTime"] == "2026-03-01T12:00:00.000Z"


@pytest.mark.parametrize(
    ("fields", "percent", "shown"),
    [
        ({"phase": "Preparing"}, None, "Preparing"),
        ({"phase": "Loading", "total_steps": 10}, 0, "Loading"),
        ({"phase": "Training", "step": 7}, None, "step 7"),
        ({"phase": "Training", "step": 999, "total_steps": 1000}, 99, "99 % 999/1000"),
        ({"phase": "Exporting", "step": 10, "total_steps": 10}, 100, "100 % 10/10"),
        ({"phase": "Training", "step": 11, "total_steps": 10}, 100, "100 % 11/10"),
    ],
)
def test_percent_and_display(fields: dict[str, object], percent: int | None, shown: str) -> None:
    written = progress.advance(None, incoming(**fields), NOW)
    assert (written.get("percent"), written["display"]) == (percent, shown)


def test_without_a_total_the_senders_percentage_counts() -> None:
    written = progress.advance(None, Incoming(Report(phase="Training"), percent=45, own_clock=False), NOW)
    assert (written["percent"], written["display"]) == (45, "45 %")


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"reward": 0.5, "loss": 1.0}, "reward 0.5"),
        ({"eval_loss": 2.0}, "eval loss 2"),
        ({"tokens_per_second": 950.4}, "950 tok/s"),
        ({"tokens_per_second": 2.5e6}, "2.5M tok/s"),
        ({"grad_norm": 1.0}, None),
    ],
)
def test_headline(metrics: dict[str, float], expected: str | None) -> None:
    assert progress.headline(metrics) == expected


def test_eta_is_the_senders_or_follows_from_the_pace() -> None:
    first = progress.advance(None, incoming(step=10, total_steps=100), NOW)
    assert "etaSeconds" not in first
    second = progress.advance(first, incoming(step=20, total_steps=100), NOW + timedelta(seconds=20))
    assert second["etaSeconds"] == 160
    standing = progress.advance(second, incoming(step=20, total_steps=100), NOW + timedelta(seconds=50))
    assert standing["etaSeconds"] == 130
    told = progress.advance(second, incoming(step=21, total_steps=100, eta_seconds=7), NOW + timedelta(seconds=50))
    assert told["etaSeconds"] == 7


def test_a_restarted_trainer_keeps_the_facts_but_not_the_position() -> None:
    resolved = Resolved(zero_stage=2, warmup_steps=3, total_steps=285, precision="BF16", attention="sdpa")
    before = progress.advance(None, incoming(step=120, total_steps=285, checkpoint=CHECKPOINT, resolved=resolved), NOW)
    after = progress.advance(before, incoming(phase="Preparing"), NOW + timedelta(seconds=60))
    assert after["checkpoint"] == CHECKPOINT.to_wire()
    assert after["resolved"] == resolved.to_wire()
    assert after["display"] == "Preparing"
    assert "percent" not in after


def test_last_advance_never_goes_back_nor_into_the_future() -> None:
    ahead = incoming(step=1, last_advance_time="2027-01-01T00:00:00Z")
    first = progress.advance(None, ahead, NOW)
    assert first["lastAdvanceTime"] == "2026-03-01T12:00:00.000Z"
    behind = incoming(step=2, last_advance_time="2026-03-01T11:00:00Z")
    assert progress.advance(first, behind, NOW + timedelta(seconds=9))["lastAdvanceTime"] == first["lastAdvanceTime"]


def test_a_heartbeat_is_no_advance() -> None:
    first = progress.advance(None, incoming(step=1, last_advance_time="2026-03-01T11:59:30Z"), NOW)
    later = progress.advance(
        first, incoming(step=1, last_advance_time="2026-03-01T11:59:30Z"), NOW + timedelta(seconds=30)
    )
    assert later["lastAdvanceTime"] == "2026-03-01T11:59:30.000Z"
    assert later["lastUpdateTime"] == "2026-03-01T12:00:30.000Z"


def test_kubeflows_senders_advance_with_their_step_or_percentage() -> None:
    def told(percent: int, step: int) -> Incoming:
        return Incoming(Report(phase="Training", step=step), percent=percent, own_clock=False)

    first = progress.advance(None, told(1, 5), NOW)
    same = progress.advance(first, told(1, 5), NOW + timedelta(seconds=10))
    moved = progress.advance(same, told(1, 6), NOW + timedelta(seconds=20))
    times = [each["lastAdvanceTime"] for each in (first, same, moved)]
    assert [time[-7:] for time in times] == ["00.000Z", "00.000Z", "20.000Z"]


def test_everything_at_its_largest_fits_the_schema() -> None:
    name = "n" * 63
    report = Report(
        phase="Training",
        step=10**12,
        total_steps=10**12,
        epoch=1e300,
        slowest_rank=1023,
        metrics={f"{name}{chr(48 + number)}": -1.2345678901234567e-300 for number in range(MAX_METRICS)},
        last_advance_time="2026-03-01T12:00:00.123456+00:00",
        checkpoint=CHECKPOINT,
        data_report=DataReport(rows=1, used=1, tokens=1, refused_by_reason={"tooLong": 3}),
        resolved=Resolved(zero_stage=2, warmup_steps=3, total_steps=285, precision="BF16", attention="sdpa"),
    )
    written = progress.advance(None, Incoming(report), NOW)
    assert Progress.model_validate(written).to_wire() == written


def test_urgent_is_what_somebody_waits_for() -> None:
    base = progress.advance(None, incoming(step=1, total_steps=100, metrics={"loss": 1.0}), NOW)
    later = NOW + timedelta(seconds=5)

    def urgent(**fields: object) -> bool:
        report = incoming(**{"step": 2, "total_steps": 100, **fields})
        return progress.is_urgent(base, progress.advance(base, report, later))

    assert progress.is_urgent(None, base)
    assert not urgent(metrics={"loss": 0.5})
    assert urgent(phase="Saving")
    assert urgent(checkpoint=CHECKPOINT)


def test_a_warning_is_of_its_report_alone_and_seen_at_once() -> None:
    warning = Warned(reason="SamplerMismatch", message="off by a nat", step=3)
    healthy = progress.advance(None, incoming(step=2), NOW)
    warned = progress.advance(healthy, incoming(step=3, warning=warning), NOW)
    assert warned["warning"] == {"reason": "SamplerMismatch", "message": "off by a nat", "step": 3}
    assert Progress.model_validate(warned).warning is not None
    over = progress.advance(warned, incoming(step=4), NOW)
    assert "warning" not in over
    assert progress.is_urgent(healthy, warned)
    assert progress.is_urgent(warned, over)


def test_a_person_sees_percentages_not_losses() -> None:
    base = progress.advance(None, incoming(step=1, total_steps=1000), NOW)
    same = progress.advance(base, incoming(step=2, total_steps=1000, metrics={"loss": 0.5}), NOW)
    other = progress.advance(base, incoming(step=10, total_steps=1000), NOW)
    assert not progress.is_visible(base, same)
    assert progress.is_visible(base, other)


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 500), st.integers(0, 3600), st.integers(-7200, 7200)), min_size=1, max_size=12
    )
)
def test_any_sequence_of_reports_keeps_the_rules(steps: list[tuple[int, int, int]]) -> None:
    before, now, advanced = None, NOW, ""
    for step, pause, skew in steps:
        now += timedelta(seconds=pause)
        claimed = (now + timedelta(seconds=skew)).isoformat()
        before = progress.advance(before, incoming(step=step, total_steps=285, last_advance_time=claimed), now)
        assert 0 <= before["percent"] <= 100
        Progress.model_validate(before)
        assert advanced <= before["lastAdvanceTime"] <= before["lastUpdateTime"]
        advanced = before["lastAdvanceTime"]


def test_a_best_that_is_lost_is_not_carried_over() -> None:
    """It is sent with the checkpoint; a report without a checkpoint says nothing of it."""
    best = Best(step=80, metric="eval_loss", value=0.5, uri="pvc://runs/a/best")
    written = progress.advance(None, incoming(checkpoint=CHECKPOINT, best=best), NOW)
    assert progress.advance(written, incoming(step=5), NOW)["best"] == best.to_wire()
    assert "best" not in progress.advance(written, incoming(checkpoint=CHECKPOINT), NOW)
