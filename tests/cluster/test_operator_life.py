"""The operator's own life: started in the middle of things, killed, told to stop, without the kinds it needs."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from operator_kit import World, operator, operator_kubeconfig, wait_for
from test_operator_flow import failure, started

from devcluster.testing import Cluster
from posttrain_api.reasons import Reason

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("operator")]
_WRITE = re.compile(r"(POST|PATCH|PUT|DELETE) /api")


def versions(world: World) -> dict[str, str]:
    kinds = "posttrainingjobs,pytorchjobs,configmaps,pods"
    text = world.kubectl(
        "get", kinds, "-o", "jsonpath={range .items[*]}{.kind}/{.metadata.name}={.metadata.resourceVersion} {end}"
    )
    return dict(pair.split("=") for pair in text.split())


def test_a_restart_in_the_middle_writes_nothing(plane: Cluster, world: World, tmp_path: Path) -> None:
    with operator(plane, tmp_path) as first:
        started(world)
        world.job("waits", model={"fromJob": {"name": "job"}}, stage="SFT", tuning="Full")
        world.until("waits", reason="WaitingForDependency")
        world.job("held", suspend=True)
        world.until("held", reason="UserSuspended")
        world.job("short", storage={"claimName": "none"})
        world.until("short", reason="StorageNotFound")
        assert first.stop() == 0
    before = versions(world)
    with operator(plane, tmp_path) as second:
        time.sleep(3)  # two looks at what is stalled
        assert versions(world) == before
        ours = [line for line in second.log.read_text().splitlines() if world.namespace in line]
        assert not [line for line in ours if _WRITE.search(line)]
        assert "GET" in "".join(ours)


def test_what_happened_meanwhile_is_caught_up(plane: Cluster, world: World, tmp_path: Path) -> None:
    """Killed, a pod replaced, a job finished for good: the next process finds both."""
    with operator(plane, tmp_path) as first:
        master, worker = started(world)
        lost = started(world, "lost")
        first.stop(signal.SIGKILL)
    world.end_pod(master, 51, failure(Reason.STORAGE_FULL, 51))
    world.child_condition("job", "Failed", "True")
    world.vanish(lost[1])
    wait_for(lambda: world.get("pod", lost[1]) is None, "the worker to go")
    world.pod("lost", "worker", 0)
    with operator(plane, tmp_path):
        world.until("job", state="Failed", reason="StorageFull")
        status = world.until("lost", state="Restarting", reason="PeerLost")
        assert status["restarts"]["byCause"] == {"PeerLost": 1}
        for pod in lost:
            wait_for(
                lambda pod=pod: (world.get("pod", pod) or {}).get("metadata", {}).get("deletionTimestamp"),
                f"{pod} to be deleted",
            )
    assert worker


def test_sigterm_ends_it_quickly_and_gracefully(plane: Cluster, tmp_path: Path) -> None:
    with operator(plane, tmp_path) as process:
        begun = time.monotonic()
        assert process.stop(signal.SIGTERM) == 0
        assert time.monotonic() - begun < 4


def test_without_rights_it_is_never_ready(plane: Cluster, tmp_path: Path) -> None:
    """An operator that may not list must not look as if it watched."""
    plane.kubectl("create", "serviceaccount", "nobody", "-n", "default")
    config = operator_kubeconfig(plane, tmp_path)
    token = plane.kubectl("create", "token", "nobody", "-n", "default").strip()
    config.write_text(re.sub(r'"token": "[^"]+"', f'"token": "{token}"', config.read_text()))
    from operator_kit import Operator

    process = Operator(config, tmp_path / "log")
    try:
        time.sleep(4)
        assert "ready after" not in process.log.read_text()
    finally:
        process.stop(signal.SIGKILL)


def test_no_annotation_and_no_finalizer(plane: Cluster, world: World, tmp_path: Path) -> None:
    with operator(plane, tmp_path):
        started(world)
    found = json.loads(world.kubectl("get", "ptj", "job", "-o", "json", "--show-managed-fields"))
    assert "finalizers" not in found["metadata"]
    assert [key for key in found["metadata"].get("annotations") or {} if "kopf" in key] == []
    managers = {entry["manager"] for entry in found["metadata"]["managedFields"]}
    assert managers <= {"kubectl", "posttrain-status"}


def test_bad_settings_are_named(tmp_path: Path) -> None:
    import subprocess
    import sys

    env = {"PATH": os.environ["PATH"], "POSTTRAIN_OPERATOR_TRAINER_IMAGE": "x", "POSTTRAIN_OPERATOR_TIME_SCALE": "fast"}
    done = subprocess.run(
        [sys.executable, "-m", "posttrain_operator"], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "POSTTRAIN_OPERATOR_TIME_SCALE must be a number (found 'fast')" in done.stderr
