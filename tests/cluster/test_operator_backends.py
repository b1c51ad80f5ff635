"""Two kinds of child on a real API server: which one a job gets, and a kind that comes while the operator runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from operator_kit import World, operator, prepare, uid_of, wait_for

from devcluster import binaries
from devcluster.testing import Cluster, control_plane

pytestmark = [pytest.mark.cluster, pytest.mark.faults, pytest.mark.xdist_group("operator-backends")]
CHANGED = 3
"""The operator's exit code where the kinds have changed: its pod is started again."""


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    """A control plane of its own: a kind that comes ends the operators of all other tests."""
    with control_plane() as cluster:
        prepare(cluster)
        yield cluster


@pytest.fixture(scope="module")
def home(server: Cluster) -> World:
    return World(server, "team-backends")


def install_trainjob(cluster: Cluster) -> None:
    binaries.ensure(binaries.EXTRAS["trainjob"])
    for path in sorted((binaries.manifests("trainer-controller-manager") / "crds").glob("trainer.*.yaml")):
        cluster.kubectl("apply", "--server-side", "-f", str(path))
    cluster.kubectl("wait", "--for=condition=Established", "crd/trainjobs.trainer.kubeflow.org", check=False)


def test_a_kind_that_comes_later_starts_the_jobs_that_wait_for_it(server: Cluster, home: World, tmp_path: Path) -> None:
    with operator(server, tmp_path) as first:
        home.job("waits", backend="TrainJob")
        status = home.until("waits", reason="BackendMissing")
        assert "install Kubeflow Trainer v2 and JobSet" in status["message"]
        home.job("plain")
        wait_for(lambda: home.status("plain").get("backend"), "the other backend to be taken")
        install_trainjob(server)
        assert first.process.wait(60) == CHANGED
    with operator(server, tmp_path):
        status = wait_for(lambda: (s := home.status("waits")).get("backend") and s, "the TrainJob to be made", 40)
        child = home.get("trainjob", "waits")
        assert child is not None
        assert status["backend"] == {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "name": "waits",
            "uid": uid_of(child),
        }
        runtime = home.get("trainingruntime", child["spec"]["runtimeRef"]["name"])
        assert runtime is not None
        assert runtime["metadata"]["ownerReferences"][0]["uid"] == uid_of(home.get("ptj", "waits"))
        assert home.get("pytorchjob", "waits") is None
        assert home.status("plain")["backend"]["kind"] == "PyTorchJob"


def test_auto_is_the_platform_s_choice_and_a_job_s_own_word_goes_before(
    server: Cluster, home: World, tmp_path: Path
) -> None:
    install_trainjob(server)
    with operator(server, tmp_path, BACKEND="TrainJob"):
        home.job("auto", backend="Auto")
        home.job("own", backend="PyTorchJob")
        for name, kind in (("auto", "TrainJob"), ("own", "PyTorchJob")):
            status = wait_for(lambda name=name: (s := home.status(name)).get("backend") and s, f"{name} to start")
            assert status["backend"]["kind"] == kind
        home.patch_job("auto", {"suspend": True})
        wait_for(lambda: (home.get("trainjob", "auto") or {})["spec"]["suspend"], "the TrainJob to be suspended")
        other = '{"spec":{"backend":"PyTorchJob"}}'
        said = home.kubectl("patch", "ptj", "auto", "--type=merge", "-p", other, check=False)
        assert "immutable now: spec.backend" in said
        home.kubectl("delete", "ptj", "auto")
        wait_for(lambda: home.get("trainjob", "auto") is None, "the TrainJob to go with its job")


def test_a_trainjob_of_somebody_else_is_left_alone(server: Cluster, home: World, tmp_path: Path) -> None:
    install_trainjob(server)
    theirs = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {"name": "taken"}}
    home.apply({**theirs, "spec": {"runtimeRef": {"name": "torch-distributed"}}})
    with operator(server, tmp_path):
        home.job("taken", backend="TrainJob")
        status = home.until("taken", reason="NameConflict")
        assert "a TrainJob named taken exists and is not this job's" in status["message"]
        found = home.get("trainjob", "taken")
        assert found is not None
        assert found["spec"]["runtimeRef"]["name"] == "torch-distributed"
