"""The status server against a real API server, under the chart's rights: real tokens, real server-side apply."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import status_kit as kit
from operator_kit import SYSTEM, operator_kubeconfig

from devcluster.testing import Cluster
from posttrain_api import names
from posttrain_api.records import Report
from posttrain_operator.cluster.errors import Conflict
from posttrain_trainer.reporter import Reporter

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("operator")]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster(plane: Cluster) -> Cluster:
    plane.kubectl("create", "namespace", kit.TEAM)
    plane.kubectl("create", "namespace", "elsewhere")
    plane.apply(kit.job("job"), kit.pod("job-master-0"), kit.pod("shell"), kit.pod("job-master-0", "elsewhere"))
    return plane


@pytest.fixture
def view(cluster: Cluster, tmp_path: Path) -> kit.TestView:
    """The cache's view of job `job` with its one pod."""
    made = kit.TestView(cluster, operator_kubeconfig(cluster, tmp_path))
    made.refresh("job")
    made.pods["job"] = frozenset({cluster.get("pod", "job-master-0", "-n", kit.TEAM)["metadata"]["uid"]})
    return made


async def eventually(check: Callable[[], Any], what: str, seconds: float = 10) -> Any:
    """Polls in a thread, so that the server in this process goes on."""
    for _ in range(int(seconds / 0.1)):
        if found := await asyncio.to_thread(check):
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(f"waited {seconds} s for {what}")


def progress(cluster: Cluster, name: str = "job") -> dict[str, Any]:
    return dict(cluster.get("ptj", name, "-n", kit.TEAM).get("status", {}).get("progress", {}))


def managers(cluster: Cluster, name: str = "job") -> dict[str, Any]:
    found = cluster.get("ptj", name, "-n", kit.TEAM, "--show-managed-fields")
    return {
        each["manager"]: each["fieldsV1"]["f:status"]
        for each in found["metadata"]["managedFields"]
        if each.get("subresource") == "status"
    }


async def test_the_jobs_pod_is_heard_and_progress_has_its_own_manager(cluster: Cluster, view: kit.TestView) -> None:
    bearer = kit.token(cluster, "job-master-0")
    async with kit.running(view) as running:
        code, answer = await running.post("job", bearer, step=42, metrics={"loss": 1.25})
        assert (code, answer["accepted"]) == (200, True)
        await eventually(lambda: progress(cluster).get("step") == 42, "the progress")
    written = progress(cluster)
    assert written["display"] == "42 % 42/100"
    assert written["metrics"] == [{"name": "loss", "value": "1.25"}]
    assert set(managers(cluster)) == {names.PROGRESS_MANAGER}
    assert list(managers(cluster)[names.PROGRESS_MANAGER]) == ["f:progress"]
    assert "42 % 42/100" in cluster.kubectl("get", "ptj", "-n", kit.TEAM)


async def test_nobody_else_is_heard(cluster: Cluster, view: kit.TestView) -> None:
    good = kit.token(cluster, "job-master-0")
    cases = {
        "a neighbour pod of the same service account": (kit.token(cluster, "shell"), 403, "PodNotOfJob"),
        "a pod of the same name in another namespace": (
            kit.token(cluster, "job-master-0", "elsewhere"),
            403,
            "OtherNamespace",
        ),
        "a token for the API server": (
            kit.token(cluster, "job-master-0", audience="https://kubernetes.default.svc"),
            401,
            "TokenRefused",
        ),
        "a token bound to no pod": (kit.token(cluster, None), 401, "TokenRefused"),
        "a token past its end": (kit.expired(cluster, good), 401, "TokenRefused"),
        "a token with a broken signature": (good[:-6] + "AAAAAA", 401, "TokenRefused"),
        "no token at all": ("nonsense", 401, "TokenRefused"),
    }
    async with kit.running(view) as running:
        for what, (bearer, code, reason) in cases.items():
            found, answer = await running.post("job", bearer, step=77)
            assert (found, answer["reason"]) == (code, reason), what
        assert (await running.post("other", good))[0] == 404
        assert (await running.post("job", good))[0] == 200
    assert progress(cluster).get("step") != 77


async def test_two_managers_do_not_disturb_each_other(cluster: Cluster, view: kit.TestView) -> None:
    cluster.apply(kit.job("pair"))
    view.refresh("pair")
    view.pods["pair"] = view.pods["job"]
    bearer = kit.token(cluster, "job-master-0")
    async with kit.running(view) as running:

        async def owner() -> None:
            for attempts in range(1, 16):
                found = await asyncio.to_thread(view.refresh, "pair")
                version = found["metadata"]["resourceVersion"]
                body = {"state": "Running", "attempts": attempts}
                with contextlib.suppress(Conflict):  # progress was written in between, as in life
                    await running.access.apply_status(kit.TEAM, "pair", body, names.STATUS_MANAGER, version)

        writing = asyncio.create_task(owner())
        step = 0
        while not writing.done() and step < 15:  # no more than a pod may send at once, however slow the machine
            step += 1
            assert (await running.post("pair", bearer, step=min(step, 99)))[0] == 200
            await asyncio.sleep(0.02)
        await writing
        assert (await running.post("pair", bearer, step=100))[0] == 200
        await eventually(lambda: progress(cluster, "pair").get("step") == 100, "the last step")
    status = cluster.get("ptj", "pair", "-n", kit.TEAM)["status"]
    assert status["state"] == "Running"
    assert status["attempts"] >= 10
    assert {name: set(fields) for name, fields in managers(cluster, "pair").items()} == {
        names.STATUS_MANAGER: {"f:state", "f:attempts"},
        names.PROGRESS_MANAGER: {"f:progress"},
    }


async def test_a_job_made_anew_gets_nothing_of_the_old_one(cluster: Cluster, view: kit.TestView) -> None:
    cluster.apply(kit.job("again"))
    view.refresh("again")
    view.pods["again"] = view.pods["job"]
    bearer = kit.token(cluster, "job-master-0")
    cluster.kubectl("delete", "ptj", "again", "-n", kit.TEAM)
    cluster.apply(kit.job("again"))
    async with kit.running(view) as running:
        assert (await running.post("again", bearer, step=9))[0] == 200
        await asyncio.sleep(1.0)
    assert progress(cluster, "again") == {}


async def test_what_the_schema_would_refuse_stops_nothing_that_follows(cluster: Cluster, view: kit.TestView) -> None:
    bearer = kit.token(cluster, "job-master-0")
    async with kit.running(view) as running:
        bad = {"step": 1, "time": "yesterday", "uri": "pvc://a/b", "sizeBytes": 1, "digest": "d"}
        good = {**bad, "time": "2026-03-01T12:00:00.123456Z"}
        assert (await running.post("job", bearer, step=50, checkpoint=bad))[0] == 422
        assert (await running.post("job", bearer, step=51, checkpoint=good))[0] == 200
        await eventually(lambda: progress(cluster).get("step") == 51, "the good report")
    assert progress(cluster)["checkpoint"] == good


async def test_a_deleted_pods_token_stops_working(cluster: Cluster, view: kit.TestView) -> None:
    cluster.apply(kit.pod("leaver"))
    uid = cluster.get("pod", "leaver", "-n", kit.TEAM)["metadata"]["uid"]
    view.pods["job"] = view.pods["job"] | {uid}
    bearer = kit.token(cluster, "leaver")
    async with kit.running(view) as running:
        assert (await running.post("job", bearer))[0] == 200
        cluster.kubectl("delete", "pod", "leaver", "-n", kit.TEAM, "--grace-period=0", "--force")
        start = datetime.now(UTC)
        while (await running.post("job", bearer))[0] == 200:
            assert (datetime.now(UTC) - start).total_seconds() < 30
            await asyncio.sleep(0.5)
        assert (await running.post("job", bearer))[0] == 401


async def test_replicas_share_the_charts_secret(cluster: Cluster, view: kit.TestView) -> None:
    cluster.kubectl("patch", "secret", kit.SECRET, "-n", SYSTEM, "--type=merge", "-p", '{"data": null}')
    async with kit.running(view) as one, kit.running(view) as two:
        assert one.server.ca_bundle() == two.server.ca_bundle()
        found = cluster.get("secret", kit.SECRET, "-n", SYSTEM)
    assert set(found["data"]) == {"ca.crt", "ca.key", "next-ca.key", "tls.crt", "tls.key"}
    assert found["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"


async def test_our_reporter_speaks_to_it(cluster: Cluster, view: kit.TestView, tmp_path: Path) -> None:
    async with kit.running(view) as running:
        mounts = kit.write_mounts(tmp_path, running.server, kit.token(cluster, "job-master-0"))
        reporter = Reporter.from_env({**mounts, names.ENV_STATUS_URL: running.url("job")})
        reporter.report(Report(phase="Exporting", step=88, total_steps=100))
        await eventually(lambda: progress(cluster).get("step") == 88, "the report")
        await asyncio.to_thread(reporter.close)
    assert progress(cluster)["phase"] == "Exporting"


async def test_an_ordinary_hugging_face_trainer_reports(cluster: Cluster, view: kit.TestView, tmp_path: Path) -> None:
    """No code of ours in that program: Kubeflow's three variables are all it gets."""
    cluster.apply(kit.job("plain"))
    view.refresh("plain")
    view.pods["plain"] = view.pods["job"]
    async with kit.running(view) as running:
        mounts = kit.write_mounts(tmp_path, running.server, kit.token(cluster, "job-master-0"))
        url = running.url("plain", names.KUBEFLOW_STATUS_PATH)
        unset = (*(name for name in os.environ if name.startswith("POSTTRAIN_")), "PYTHONPATH")
        environ = {name: value for name, value in os.environ.items() if name not in unset}
        environ |= {**mounts, names.ENV_KUBEFLOW_URL: url, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(HERE / "hf_trainer.py"), str(tmp_path / "out")]
        done = await asyncio.to_thread(
            subprocess.run, command, env=environ, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-2000:]
        await eventually(lambda: progress(cluster, "plain").get("percent") == 100, "the end")
    written = progress(cluster, "plain")
    assert written["phase"] == "Done"
    assert written["headline"].startswith("loss ")
    found = {each["name"]: float(each["value"]) for each in written["metrics"]}
    assert {"loss", "learning_rate", "grad_norm"} <= set(found)
