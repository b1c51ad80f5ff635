"""The status server over real TLS: every answer, and what each leaves behind."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from statusserver_rig import PLACE, running

from posttrain_api import names
from posttrain_operator.plan.types import PlanSettings
from posttrain_operator.settings import Settings, Timing
from posttrain_operator.statusserver import handlers
from posttrain_operator.statusserver.server import ServerOptions, options_of


async def written(writes: list[dict[str, Any]], count: int = 1) -> dict[str, Any]:
    async with asyncio.timeout(3):
        while len(writes) < count:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)
    return writes[-1]


async def test_a_report_of_the_jobs_pod_becomes_progress() -> None:
    async with running() as rig:
        code, answer, _ = await rig.post({"phase": "Training", "step": 3, "totalSteps": 12, "metrics": {"loss": 2.5}})
        wishes = {"dump": False, "stallSeconds": 1800}
        assert (code, answer) == (200, {"accepted": True, "droppedMetrics": [], **wishes})
        assert (await written(rig.cluster.writes))["display"] == "25 % 3/12"
        assert rig.cluster.results == ["accepted"]


async def test_kubeflows_path_takes_kubeflows_body() -> None:
    body = {"trainerStatus": {"progressPercentage": 45, "metrics": [{"name": "loss", "value": "nan"}]}}
    async with running() as rig:
        code, answer, _ = await rig.post(body, path=names.KUBEFLOW_STATUS_PATH)
        assert (code, answer["droppedMetrics"]) == (200, ["loss"])
        assert (await written(rig.cluster.writes))["display"] == "45 %"


@pytest.mark.parametrize(
    ("token", "where", "code", "reason"),
    [
        (None, {}, 401, "TokenRefused"),
        ("nonsense", {}, 401, "TokenRefused"),
        ("unbound", {}, 401, "TokenRefused"),
        ("neighbour", {}, 403, "PodNotOfJob"),
        ("other", {}, 403, "OtherNamespace"),
        ("good", {"namespace": "elsewhere"}, 403, "OtherNamespace"),
        ("good", {"name": "missing"}, 404, "UnknownJob"),
        ("good", {"name": "done"}, 409, "JobFinished"),
    ],
)
async def test_who_may_not_report(token: str | None, where: dict[str, str], code: int, reason: str) -> None:
    async with running() as rig:
        found, answer, headers = await rig.post(token=token, **where)
        assert (found, answer["code"], answer["reason"]) == (code, code, reason)
        assert len(answer["message"]) > 20
        assert ("WWW-Authenticate" in headers) == (code == 401)
        await asyncio.sleep(0.05)
        assert rig.cluster.writes == []


async def test_nothing_about_jobs_is_told_to_other_namespaces() -> None:
    async with running() as rig:
        answers = [await rig.post(token="other", name=name) for name in ("job", "missing", "done")]
        assert len({json.dumps(answer) for _, answer, _ in answers}) == 1


async def test_a_pod_of_an_earlier_attempt_is_refused() -> None:
    async with running() as rig:
        rig.cluster.pods["team", "job"] = frozenset({"p2"})
        code, answer, _ = await rig.post()
        assert (code, answer["reason"]) == (403, "PodNotOfJob")


async def test_a_bad_body_is_named() -> None:
    async with running() as rig:
        code, answer, _ = await rig.post({"phase": "Training", "step": "many"})
        assert (code, answer["reason"]) == (422, "InvalidReport")
        assert "step" in answer["message"]
        assert "'many'" in answer["message"]
        code, answer, _ = await rig.post(b"{")
        assert code == 422


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_body_is_refused_however_it_is_sent(chunked: bool) -> None:
    async def parts() -> Any:
        for _ in range(20):
            yield b" " * 1024

    async with running() as rig:
        headers = {"Authorization": "Bearer good"}
        data = parts() if chunked else b" " * 20480
        async with rig.client.post(rig.url(), data=data, headers=headers) as answer:
            assert answer.status == 413
            assert (await answer.json())["reason"] == "ReportTooLarge"


async def test_a_body_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "BODY_SECONDS", 0.1)

    async def slowly() -> Any:
        yield b"{"
        await asyncio.sleep(1.0)

    async with running() as rig:
        async with rig.client.post(rig.url(), data=slowly(), headers={"Authorization": "Bearer good"}) as answer:
            assert answer.status == 408
        assert rig.cluster.results == ["too_slow"]


async def test_a_pod_that_reports_too_often_is_told_to_wait() -> None:
    async with running(per_pod=(3, 30.0)) as rig:
        codes = [(await rig.post())[0] for _ in range(3)]
        code, answer, headers = await rig.post()
        assert (codes, code, answer["reason"]) == ([200, 200, 200], 429, "TooManyReports")
        assert 28 <= int(headers["Retry-After"]) <= 30


async def test_an_address_that_keeps_failing_costs_no_more_reviews() -> None:
    async with running(failures=(3, 60.0)) as rig:
        codes = [(await rig.post(token=f"bad{number}"))[0] for number in range(6)]
        assert codes == [401, 401, 401, 429, 429, 429]
        assert rig.cluster.reviews == 3


async def test_an_outage_of_the_api_server_is_not_the_pods_fault() -> None:
    async with running() as rig:
        rig.cluster.review_error = OSError("connection refused")
        code, answer, headers = await rig.post()
        assert (code, answer["reason"], headers["Retry-After"]) == (503, "ReviewUnavailable", "5")
        rig.cluster.review_error = None
        assert (await rig.post())[0] == 200
        assert rig.cluster.results == ["unavailable", "accepted"]


async def test_other_paths_and_methods_are_not_there() -> None:
    async with running() as rig:
        async with rig.client.get(rig.url()) as answer:
            assert answer.status == 405
        async with rig.client.post(rig.url("/apis")) as answer:
            assert answer.status == 404


async def test_without_our_authority_there_is_no_connection() -> None:
    async with running() as rig, aiohttp.ClientSession() as stranger:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await stranger.post(rig.url())


async def test_close_writes_the_last_report() -> None:
    async with running() as rig:
        await rig.post({"phase": "Training", "step": 1, "totalSteps": 9})
        await written(rig.cluster.writes)
        await rig.post({"phase": "Training", "step": 2, "totalSteps": 9})
        await rig.server.close()
        assert rig.cluster.writes[-1]["step"] == 2


SETTINGS = Settings(
    namespace="ops",
    plan=PlanSettings(trainer_image="trainer"),
    status_url="https://posttrain.ops.svc:10443",
    status_port=10443,
    status_secret="posttrain-status",
)


def test_options_follow_from_the_operators_settings() -> None:
    options = options_of(SETTINGS)
    assert (options.port, options.place.namespace, options.place.name) == (10443, "ops", "posttrain-status")
    assert options.place.names[0] == "posttrain.ops.svc"
    fast = options_of(Settings(**{**vars(SETTINGS), "timing": Timing().scaled(0.1)}))
    assert (fast.writing.min_interval, fast.writing.max_interval) == pytest.approx((1.0, 6.0))


def test_settings_that_name_no_secret_are_refused() -> None:
    with pytest.raises(ValueError, match=r"POSTTRAIN_OPERATOR_STATUS_URL.*_STATUS_SECRET"):
        options_of(Settings(**{**vars(SETTINGS), "status_secret": ""}))


def test_defaults_are_those_of_the_documentation() -> None:
    options = ServerOptions(PLACE)
    assert (options.writing.min_interval, options.writing.max_interval, options.review_ttl) == (10, 60, 10)
