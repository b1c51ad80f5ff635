"""The chart on a real API server: what is installed, who may do what, and what an upgrade and an uninstall leave."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devcluster import binaries
from devcluster.testing import Cluster, control_plane

CHART = str(Path(__file__).parents[2] / "helm" / "posttrain-operator")
NAMESPACE = "posttrain-system"
OPERATOR = f"system:serviceaccount:{NAMESPACE}:posttrain-operator"
SECRET = "posttrain-operator-status"
JOB = """
apiVersion: posttrain.dev/v1alpha1
kind: PostTrainingJob
metadata: {name: kept, namespace: team}
spec:
  stage: SFT
  model: {uri: "hf://Qwen/Qwen2.5-0.5B"}
  data: {train: [{uri: "pvc://data/train.jsonl"}]}
  lora: {rank: 8}
  storage: {claimName: runs}
"""

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("chart-installed")]


@pytest.fixture(scope="module")
def installed() -> Iterator[Cluster]:
    """A control plane with the chart on it, in a namespace that enforces the restricted standard."""
    with control_plane() as cluster:
        cluster.kubectl("create", "namespace", NAMESPACE)
        cluster.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
        cluster.kubectl("create", "namespace", "team")
        cluster.helm("install", "posttrain-operator", CHART, "--namespace", NAMESPACE)
        wait_until(lambda: established(cluster, "posttrainingjobs.posttrain.dev"), "the kind to be served")
        yield cluster


def established(cluster: Cluster, kind: str) -> bool:
    """`kubectl wait` itself fails where the status has no conditions yet."""
    conditions = cluster.get("crd", kind)["status"].get("conditions") or []
    return any(each["type"] == "Established" and each["status"] == "True" for each in conditions)


def allowed(cluster: Cluster, who: str, verb: str, what: str, namespace: str = "team") -> bool:
    """The API server's own answer; `what` is resource[.group][/subresource][:name]."""
    path, _, name = what.partition(":")
    path, _, subresource = path.partition("/")
    resource, _, group = path.partition(".")
    asked = {"verb": verb, "group": group, "resource": resource, "subresource": subresource, "name": name}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": who, "resourceAttributes": {**asked, "namespace": namespace}},
    }
    answer = json.loads(cluster.kubectl("create", "-o", "json", "-f", "-", stdin=json.dumps(review)))
    return bool(answer["status"]["allowed"])


def wait_until(check: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("watch", "posttrainingjobs.posttrain.dev"),
        ("patch", "posttrainingjobs.posttrain.dev/status"),
        ("create", "pytorchjobs.kubeflow.org"),
        ("delete", "pods"),
        ("create", "configmaps"),
        ("list", "events"),
        ("create", "events.events.k8s.io"),
    ],
)
def test_the_operator_may(installed: Cluster, verb: str, resource: str) -> None:
    assert allowed(installed, OPERATOR, verb, resource)


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("get", "secrets"),
        ("list", "secrets"),
        ("create", "pods"),
        ("patch", "pods"),
        ("create", "pods/exec"),
        ("get", "pods/log"),
        ("update", "posttrainingjobs.posttrain.dev"),
        ("delete", "posttrainingjobs.posttrain.dev"),
        ("delete", "persistentvolumeclaims"),
        ("create", "rolebindings"),
        ("create", "serviceaccounts/token"),
        ("impersonate", "users"),
    ],
)
def test_the_operator_may_not(installed: Cluster, verb: str, resource: str) -> None:
    assert not allowed(installed, OPERATOR, verb, resource)


def test_of_secrets_it_gets_its_own_by_name_only(installed: Cluster) -> None:
    assert allowed(installed, OPERATOR, "get", f"secrets:{SECRET}", NAMESPACE)
    assert allowed(installed, OPERATOR, "update", f"secrets:{SECRET}", NAMESPACE)
    assert not allowed(installed, OPERATOR, "get", "secrets:another", NAMESPACE)
    assert not allowed(installed, OPERATOR, "delete", f"secrets:{SECRET}", NAMESPACE)
    assert not allowed(installed, OPERATOR, "list", "secrets", NAMESPACE)


def test_of_leases_it_gets_its_own_by_name_only(installed: Cluster) -> None:
    leases = "leases.coordination.k8s.io"
    assert allowed(installed, OPERATOR, "update", f"{leases}:posttrain-operator", NAMESPACE)
    assert not allowed(installed, OPERATOR, "update", f"{leases}:another", NAMESPACE)
    assert not allowed(installed, OPERATOR, "update", f"{leases}:posttrain-operator", "team")
    assert not allowed(installed, OPERATOR, "create", leases, "team")


def test_the_clusters_own_roles_know_the_jobs(installed: Cluster) -> None:
    jobs = "posttrainingjobs.posttrain.dev"
    for name in ("view", "edit"):
        binding = ("rolebinding", f"some-{name}", f"--clusterrole={name}", f"--user={name}er", "--namespace=team")
        installed.kubectl("create", *binding)
    # A controller of the cluster adds the rules to its roles.
    wait_until(lambda: allowed(installed, "editer", "create", jobs), "the roles to be aggregated")
    assert allowed(installed, "viewer", "watch", jobs)
    assert not allowed(installed, "viewer", "create", jobs)
    assert not allowed(installed, "editer", "patch", f"{jobs}/status")


def test_the_pod_is_admitted_where_restricted_is_enforced(installed: Cluster) -> None:
    template = installed.get("deployment", "posttrain-operator", f"--namespace={NAMESPACE}")["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "try"}, "spec": template["spec"]}
    installed.kubectl("create", "--dry-run=server", f"--namespace={NAMESPACE}", "-f", "-", stdin=json.dumps(pod))
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    said = installed.kubectl(
        "create", "--dry-run=server", f"--namespace={NAMESPACE}", "-f", "-", stdin=json.dumps(pod), check=False
    )
    assert "violates PodSecurity" in said


def test_the_notes_know_whether_the_training_operator_is_there(installed: Cluster) -> None:
    upgrade = ("upgrade", "posttrain-operator", CHART, "--namespace", NAMESPACE)
    assert "BackendMissing" in installed.helm(*upgrade)
    binaries.ensure(["training-operator"])
    kind = binaries.manifests("training-operator") / "crds" / "kubeflow.org_pytorchjobs.yaml"
    installed.kubectl("apply", "--server-side", "-f", str(kind))
    wait_until(lambda: established(installed, "pytorchjobs.kubeflow.org"), "the kind to be served")
    wait_until(lambda: "BackendMissing" not in installed.helm(*upgrade), "the notes to see the new kind")


def test_an_upgrade_leaves_the_keys_alone(installed: Cluster) -> None:
    patch = '{"data":{"ca.key":"a2V5"}}'
    installed.kubectl("patch", "secret", SECRET, f"--namespace={NAMESPACE}", "--type=merge", "-p", patch)
    installed.helm("upgrade", "posttrain-operator", CHART, "--namespace", NAMESPACE, "--set", "operator.logLevel=debug")
    secret = installed.get("secret", SECRET, f"--namespace={NAMESPACE}")
    assert secret["data"] == {"ca.key": "a2V5"}


def test_an_uninstall_leaves_the_kind_and_its_jobs_and_can_be_undone(installed: Cluster) -> None:
    """Last in this file: it removes what the others look at."""
    installed.kubectl("apply", "-f", "-", stdin=JOB)
    installed.helm("uninstall", "posttrain-operator", "--namespace", NAMESPACE)
    assert installed.get("posttrainingjob", "kept", "--namespace=team")["spec"]["stage"] == "SFT"
    assert "NotFound" in installed.kubectl("get", "secret", SECRET, f"--namespace={NAMESPACE}", check=False)
    installed.helm("install", "posttrain-operator", CHART, "--namespace", NAMESPACE)
    assert installed.get("posttrainingjob", "kept", "--namespace=team")["metadata"]["name"] == "kept"
