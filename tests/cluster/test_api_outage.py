"""The control plane's own life: etcd and the API server are killed and come back, kinds are deleted and made again.

A control plane of its own: what is done here would end every other test's jobs.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from kept import Kept, allow_any_lease, kept
from operator_kit import ROOT, World, operator_kubeconfig, prepare, uid_of, wait_for
from test_operator_flow import started, success

from devcluster import binaries
from devcluster.testing import Cluster, control_plane

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("outage")]
PATIENCE = 120.0
ENVIRON = {"TIME_SCALE": "0.1", "LEASE_SECONDS": "3000"}
"""With a lease that outlasts every outage here."""
JOB_CRD = ROOT / "crds" / "posttrainingjobs.yaml"


@pytest.fixture(scope="module")
def own_plane() -> Iterator[Cluster]:
    with control_plane() as cluster:
        prepare(cluster)
        allow_any_lease(cluster)
        yield cluster


@pytest.fixture(scope="module")
def keeper(own_plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    folder = tmp_path_factory.mktemp("outage")
    with kept(operator_kubeconfig(own_plane, folder), folder / "operator", ENVIRON) as running:
        yield running


@pytest.fixture
def own_world(own_plane: Cluster, keeper: Kept) -> World:
    keeper.ready(PATIENCE)
    made = World(own_plane, f"team-{uuid.uuid4().hex[:8]}")
    # Kubernetes' own controllers back off for up to half a minute after an outage of the test before.
    wait_for(lambda: made.get("serviceaccount", "default"), "the namespace's service account", PATIENCE)
    return made


def again(plane: Cluster, name: str, away: float) -> None:
    """The component is killed, away for so many seconds, started, and the API answers."""
    plane.ask("stop-component", name=name)
    time.sleep(away)
    plane.ask("start-component", name=name)
    wait_for(lambda: plane.kubectl("get", "--raw", "/readyz", check=False).strip() == "ok", "the API server", PATIENCE)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("away", [1.0, pytest.param(30.0, marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", ["kube-apiserver", "etcd"])
def test_a_component_is_killed_and_comes_back(
    own_plane: Cluster, keeper: Kept, own_world: World, name: str, away: float
) -> None:
    """A running job goes on to its end, a new one starts, and the operator is still the same process."""
    master, worker = started(own_world)
    child, ends = uid_of(own_world.get("pytorchjob", "job")), len(keeper.ends)
    again(own_plane, name, away)
    own_world.job("new")
    made = uid_of(own_world.child("new", PATIENCE))
    own_world.end_pod(worker, 0)
    own_world.end_pod(master, 0, success())
    status = own_world.until("job", PATIENCE, state="Succeeded")
    assert status["backend"]["uid"] == child
    assert "restarts" not in status
    assert own_world.until("new", PATIENCE, state="Pending", reason="PodsMissing")["backend"]["uid"] == made
    assert len(keeper.ends) == ends


@pytest.mark.timeout(300)
def test_the_backends_kind_is_deleted_and_made_again(own_plane: Cluster, keeper: Kept, own_world: World) -> None:
    started(own_world)
    old, ends = uid_of(own_world.get("pytorchjob", "job")), len(keeper.ends)
    own_plane.kubectl("delete", "crd", "pytorchjobs.kubeflow.org", timeout=60)
    keeper.died(ends + 1, PATIENCE)
    own_world.job("new")
    assert "BackendMissing" in own_world.until("new", PATIENCE, reason="BackendMissing")["reason"]
    crd = binaries.manifests("training-operator") / "crds" / "kubeflow.org_pytorchjobs.yaml"
    own_plane.kubectl("apply", "--server-side", "-f", str(crd))
    own_world.child("new", PATIENCE)
    for pod in ("job-master-0", "job-worker-0"):
        own_world.vanish(pod)
    wait_for(lambda: (found := own_world.get("pytorchjob", "job")) and uid_of(found) != old, "a new child", PATIENCE)
    assert set(keeper.ends[ends:]) == {3}, keeper.logs[-2][-3000:]


@pytest.mark.timeout(300)
def test_our_own_kind_is_deleted_and_made_again(own_plane: Cluster, keeper: Kept, own_world: World) -> None:
    """Every job is gone with it; the operator waits for the kind and says so, and then works as before."""
    started(own_world)
    ends = len(keeper.ends)
    own_plane.kubectl("delete", "crd", "posttrainingjobs.posttrain.dev", timeout=60)
    keeper.died(ends + 1, PATIENCE)
    wait_for(lambda: "waiting for the PostTrainingJob kind" in keeper.logs[-1], "the operator to wait", PATIENCE)
    own_plane.kubectl("apply", "--server-side", "-f", str(JOB_CRD))
    keeper.ready(PATIENCE)
    own_world.job("new")
    own_world.child("new", PATIENCE)
    assert set(keeper.ends[ends:]) == {3}, keeper.logs[-2][-3000:]


def test_the_probes_tell_what_is_waited_for(tmp_path: Path) -> None:
    """Without any API server the operator lives, is not ready, and tries again for ever."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "u", "user": {"token": "x"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (tmp_path / "config").write_text(json.dumps(config))
    with kept(tmp_path / "config", tmp_path / "log", ENVIRON) as running:
        wait_for(lambda: running.logs[0].count("127.0.0.1:9") >= 3, "three tries", PATIENCE)
        assert running.ends == []
        assert "ready after" not in running.logs[0]
