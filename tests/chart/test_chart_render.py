"""What the chart makes: the operator's pod, its Service, the kind, the notes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain_api import names
from posttrain_operator.settings import read_settings

Object = dict[str, Any]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "posttrain-operator"
CRD = ROOT / "crds" / "posttrainingjobs.yaml"
EVERYTHING_ON = (
    "metrics.serviceMonitor.enabled=true",
    "metrics.trainerPodMonitor.enabled=true",
    "metrics.alerts.enabled=true",
    'commonLabels={"team":"ml"}',
    'podLabels={"mesh":"off"}',
    'podAnnotations={"note":"1"}',
    'imagePullSecrets=[{"name":"pull"}]',
    'nodeSelector={"pool":"system"}',
    'tolerations=[{"key":"system","operator":"Exists"}]',
    'affinity={"nodeAffinity":{}}',
    'priorityClassName="system-cluster-critical"',
    'serviceAccount.annotations={"role":"x"}',
    'operator.extraEnv=[{"name":"EXTRA","value":"1"}]',
)


def only(objects: list[Object], kind: str) -> Object:
    (found,) = [item for item in objects if item["kind"] == kind]
    return found


def pod(objects: list[Object]) -> Object:
    return only(objects, "Deployment")["spec"]["template"]["spec"]


def environment(objects: list[Object]) -> dict[str, Any]:
    (container,) = pod(objects)["containers"]
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def test_lint(helm: Any) -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_renders_are_the_same(render: Any) -> None:
    assert render(*EVERYTHING_ON) == render(*EVERYTHING_ON)


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in project


def test_every_object_is_labelled_named_and_placed(render: Any) -> None:
    objects = render(*EVERYTHING_ON)
    keys = [(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in objects]
    assert len(set(keys)) == len(keys)
    for item in objects:
        labels = item["metadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == "posttrain", item["kind"]
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["team"] == "ml"
        cluster_wide = item["kind"].startswith("Cluster") or item["kind"] == "CustomResourceDefinition"
        assert item["metadata"].get("namespace") == (None if cluster_wide else "posttrain-system")


def test_the_pod_keeps_the_restricted_standard(default: list[Object]) -> None:
    spec = pod(default)
    (container,) = spec["containers"]
    assert (
        spec["securityContext"] | {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        == spec["securityContext"]
    )
    assert spec["securityContext"]["runAsUser"] == 1000
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
    assert all(set(volume) - {"name"} == {"emptyDir"} for volume in spec["volumes"])


def test_two_replicas_that_one_drain_or_rollout_never_takes_together(default: list[Object]) -> None:
    deployment, budget = only(default, "Deployment")["spec"], only(default, "PodDisruptionBudget")["spec"]
    assert (deployment["replicas"], deployment["strategy"]["rollingUpdate"]["maxUnavailable"]) == (2, 0)
    assert budget["maxUnavailable"] == 1
    assert budget["selector"] == deployment["selector"]
    terms = pod(default)["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert {term["podAffinityTerm"]["topologyKey"]: term["weight"] for term in terms} == {
        "kubernetes.io/hostname": 100,
        "topology.kubernetes.io/zone": 50,
    }
    assert all(term["podAffinityTerm"]["labelSelector"] == deployment["selector"] for term in terms)
    assert pod(default)["containers"][0]["command"] == ["python", "-m", "posttrain_operator"]


def test_one_replica_has_no_budget_that_would_block_every_drain(render: Any) -> None:
    objects = render("replicas=1", 'affinity={"nodeAffinity":{"x":1}}')
    assert only(objects, "Deployment")["spec"]["replicas"] == 1
    assert not [o for o in objects if o["kind"] == "PodDisruptionBudget"]
    assert pod(objects)["affinity"] == {"nodeAffinity": {"x": 1}}


def test_the_lease_is_named_after_the_release(render: Any) -> None:
    objects = render('fullnameOverride="pt"', "leaderElection.leaseSeconds=60")
    assert environment(objects)["POSTTRAIN_OPERATOR_LEASE_NAME"] == "pt"
    assert environment(objects)["POSTTRAIN_OPERATOR_LEASE_SECONDS"] == "60"


def test_probes_and_service_reach_ports_that_the_container_has(default: list[Object]) -> None:
    (container,) = pod(default)["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"status": 10443, "metrics": 8080}
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "metrics"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    service = only(default, "Service")["spec"]
    assert {(p["name"], p["port"], p["targetPort"]) for p in service["ports"]} == {
        ("status", 10443, "status"),
        ("metrics", 8080, "metrics"),
    }
    template = only(default, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= template.items()
    assert only(default, "Deployment")["spec"]["selector"]["matchLabels"] == service["selector"]


def test_the_status_url_is_the_services_name(render: Any) -> None:
    objects = render("statusServer.port=12443", 'fullnameOverride="pt"')
    assert only(objects, "Service")["metadata"]["name"] == "pt"
    assert environment(objects)["POSTTRAIN_OPERATOR_STATUS_URL"] == "https://pt.posttrain-system.svc:12443"
    assert environment(objects)["POSTTRAIN_OPERATOR_STATUS_PORT"] == "12443"


def test_without_the_status_server_there_is_no_url_no_port_no_secret(render: Any) -> None:
    objects = render("statusServer.enabled=false")
    assert environment(objects)["POSTTRAIN_OPERATOR_STATUS_URL"] == ""
    assert [p["name"] for p in only(objects, "Service")["spec"]["ports"]] == ["metrics"]
    assert not [o for o in objects if o["kind"] == "Secret"]


def test_values_reach_the_operator(render: Any) -> None:
    digest = "sha256:" + "a" * 64
    env = environment(
        render(
            f'trainer.image={{"repository":"registry.example/trainer","digest":"{digest}"}}',
            'trainer.imagePullPolicy="Never"',
            "trainer.allowCPU=true",
            'backend="TrainJob"',
            'operator={"logLevel":"debug","logFormat":"text","extraEnv":[{"name":"POSTTRAIN_OPERATOR_TIME_SCALE","value":"0.1"}]}',
            'watchNamespaces=["a","b"]',
        )
    )
    assert env == {
        "POSTTRAIN_OPERATOR_NAMESPACE": {"fieldRef": {"fieldPath": "metadata.namespace"}},
        "POSTTRAIN_OPERATOR_WATCH_NAMESPACES": "a,b",
        "POSTTRAIN_OPERATOR_TRAINER_IMAGE": f"registry.example/trainer@{digest}",
        "POSTTRAIN_OPERATOR_TRAINER_IMAGE_PULL_POLICY": "Never",
        "POSTTRAIN_OPERATOR_ALLOW_CPU": "true",
        "POSTTRAIN_OPERATOR_BACKEND": "TrainJob",
        "POSTTRAIN_OPERATOR_LEASE_NAME": "release-posttrain-operator",
        "POSTTRAIN_OPERATOR_LEASE_SECONDS": "15",
        "POSTTRAIN_OPERATOR_STATUS_URL": "https://release-posttrain-operator.posttrain-system.svc:10443",
        "POSTTRAIN_OPERATOR_STATUS_PORT": "10443",
        "POSTTRAIN_OPERATOR_STATUS_SECRET": "release-posttrain-operator-status",
        "POSTTRAIN_OPERATOR_METRICS_PORT": "8080",
        "POSTTRAIN_OPERATOR_LOG_LEVEL": "debug",
        "POSTTRAIN_OPERATOR_LOG_FORMAT": "text",
        "POSTTRAIN_OPERATOR_TIME_SCALE": "0.1",
    }


class Recorded(dict[str, str]):
    """An environment that remembers what was asked for."""

    def __init__(self, values: dict[str, str]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def test_the_operator_reads_what_the_chart_sets_and_nothing_else(render: Any) -> None:
    pods_own = {"POSTTRAIN_OPERATOR_NAMESPACE": "posttrain-system"}
    env = Recorded(environment(render("trainer.allowCPU=true", 'watchNamespaces=["a","b"]')) | pods_own)
    settings = read_settings(env)
    for_tests = {"POSTTRAIN_OPERATOR_TIME_SCALE", "POSTTRAIN_OPERATOR_FAILPOINT"}
    by_extra_env = {"POSTTRAIN_OPERATOR_LOST_NODE_SECONDS", "POSTTRAIN_OPERATOR_HALF_PLACED_SECONDS"}
    assert env.asked - set(env) == for_tests | by_extra_env
    assert set(env) - env.asked == set()
    assert settings.plan.allow_cpu
    assert (settings.watch_namespaces, settings.status_port, settings.metrics_port) == (("a", "b"), 10443, 8080)
    assert settings.status_url == "https://release-posttrain-operator.posttrain-system.svc:10443"
    assert settings.status_secret == "release-posttrain-operator-status"


def test_the_operator_understands_a_chart_without_status_server(render: Any) -> None:
    env = environment(render("statusServer.enabled=false")) | {"POSTTRAIN_OPERATOR_NAMESPACE": "n"}
    settings = read_settings(env)
    assert (settings.status_url, settings.status_port, settings.status_secret) == ("", None, "")


def test_images_carry_the_charts_version(default: list[Object]) -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert pod(default)["containers"][0]["image"] == f"posttrain-operator:{version}"
    assert environment(default)["POSTTRAIN_OPERATOR_TRAINER_IMAGE"] == f"posttrain-trainer:{version}"


def test_the_secret_has_no_data_that_an_upgrade_could_reset(default: list[Object]) -> None:
    secret = only(default, "Secret")
    assert not {"data", "stringData", "immutable"} & set(secret)


def test_the_charts_kind_is_the_generated_one(default: list[Object]) -> None:
    assert (CHART / "files" / "posttrainingjobs.yaml").read_text() == CRD.read_text()
    generated, rendered = yaml.safe_load(CRD.read_text()), only(default, "CustomResourceDefinition")
    assert rendered["spec"] == generated["spec"]
    assert rendered["metadata"]["name"] == generated["metadata"]["name"] == f"{names.PLURAL}.{names.GROUP}"
    assert rendered["metadata"]["annotations"] == {
        **generated["metadata"].get("annotations", {}),
        "helm.sh/resource-policy": "keep",
    }


def test_the_kind_can_be_left_out_or_let_go(render: Any) -> None:
    assert not [o for o in render("crds.enabled=false") if o["kind"] == "CustomResourceDefinition"]
    dropped = only(render("crds.keep=false"), "CustomResourceDefinition")
    assert "helm.sh/resource-policy" not in dropped["metadata"].get("annotations", {})


def test_monitors_only_when_asked_for(default: list[Object], render: Any) -> None:
    assert not [o for o in default if o["kind"].endswith("Monitor")]
    objects = render(*EVERYTHING_ON, 'metrics.trainerPodMonitor.labels={"release":"prometheus"}')
    trainers = only(objects, "PodMonitor")
    assert trainers["spec"]["selector"]["matchLabels"] == {names.LABEL_METRICS: "true"}
    assert trainers["spec"]["podMetricsEndpoints"][0]["port"] == names.METRICS_PORT_NAME
    assert trainers["spec"]["namespaceSelector"] == {"any": True}
    assert trainers["metadata"]["labels"]["release"] == "prometheus"
    service = only(objects, "Service")
    assert (
        only(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"].items()
        <= service["metadata"]["labels"].items()
    )


def test_a_foreign_service_account_must_be_named(helm: Any, render: Any) -> None:
    refused = helm("template", "r", str(CHART), "--set", "serviceAccount.create=false")
    assert refused.returncode != 0
    assert "serviceAccount.name: required" in refused.stderr
    objects = render("serviceAccount.create=false", 'serviceAccount.name="mine"')
    assert pod(objects)["serviceAccountName"] == "mine"
    assert not [o for o in objects if o["kind"] == "ServiceAccount"]


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ((), ["rollout status deployment/r-posttrain-operator", "every namespace", "BackendMissing"]),
        (("--set", "watchNamespaces={a,b}"), ["in a, b"]),
        (("--set", "crds.keep=false"), ["deletes every PostTrainingJob"]),
        (("--set", "crds.enabled=false"), ["crds.enabled is false"]),
        (("--set", "statusServer.enabled=false"), ["show no progress"]),
        (("--set", "trainer.allowCPU=true"), ["trains on the CPU"]),
    ],
)
def test_the_notes_say_what_comes_next(helm: Any, sets: tuple[str, ...], said: list[str]) -> None:
    done = helm("install", "r", str(CHART), "--namespace", "sys", "--dry-run=client", *sets)
    assert done.returncode == 0, done.stderr
    notes = done.stdout.split("NOTES:")[1]
    assert [text for text in said if text not in " ".join(notes.split())] == []
