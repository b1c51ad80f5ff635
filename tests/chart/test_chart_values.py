"""A wrong value is refused by name before anything is installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[2] / "helm" / "posttrain-operator"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
# Maps and lists whose content is Kubernetes' own or the user's.
OPEN = {"commonLabels", "podAnnotations", "podLabels", "nodeSelector", "tolerations", "affinity", "resources"}


def sections(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all maps that have names of their own."""
    if not isinstance(value, dict) or (path and path[-1] in {*OPEN, "labels", "annotations"}):
        return []
    return [path, *(deeper for key, inner in value.items() for deeper in sections(inner, (*path, key)))]


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = SCHEMA["definitions"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def at(path: tuple[str, ...]) -> dict[str, Any]:
    schema = SCHEMA
    for key in path:
        schema = resolve(schema["properties"][key])
    return schema


@pytest.mark.parametrize("path", sections(VALUES), ids=lambda p: ".".join(p) or "root")
def test_schema_and_values_have_the_same_names(path: tuple[str, ...]) -> None:
    value = VALUES
    for key in path:
        value = value[key]
    schema = at(path)
    assert schema["additionalProperties"] is False
    # `global` comes from a parent chart: allowed, and not ours to list.
    assert set(schema["properties"]) - {"global"} == set(value)


@pytest.mark.parametrize("path", sections(VALUES), ids=lambda p: ".".join(p) or "root")
def test_an_unknown_name_is_refused(helm: Any, path: tuple[str, ...]) -> None:
    done = helm("template", "r", str(CHART), "--set", f"{'.'.join((*path, 'noSuchValue'))}=1")
    assert done.returncode != 0
    assert "additional properties 'noSuchValue' not allowed" in done.stderr


@pytest.mark.parametrize(
    ("pair", "path"),
    [
        ('trainer.allowCPU="true"', "/trainer/allowCPU"),
        ('backend="RayJob"', "/backend"),
        ('operator.logLevel="loud"', "/operator/logLevel"),
        ('operator.logFormat="xml"', "/operator/logFormat"),
        ('image.pullPolicy="Sometimes"', "/image/pullPolicy"),
        ('image.digest="abc"', "/image/digest"),
        ('trainer.image="posttrain-trainer:0.1.0"', "/trainer/image"),
        ("statusServer.port=443", "/statusServer/port"),
        ('statusServer.port="10443"', "/statusServer/port"),
        ("metrics.port=70000", "/metrics/port"),
        ('watchNamespaces="team-a"', "/watchNamespaces"),
        ('watchNamespaces=["Team_A"]', "/watchNamespaces/0"),
        ('watchNamespaces=["a","a"]', "/watchNamespaces"),
        ('metrics.serviceMonitor.interval="often"', "/metrics/serviceMonitor/interval"),
        ('crds.keep="yes"', "/crds/keep"),
        ('podAnnotations={"n":1}', "/podAnnotations/n"),
        ('imagePullSecrets=["pull"]', "/imagePullSecrets/0"),
        ('operator.extraEnv=[{"value":"1"}]', "/operator/extraEnv/0"),
        ("terminationGracePeriodSeconds=-1", "/terminationGracePeriodSeconds"),
        ("replicas=11", "/replicas"),
        ("leaderElection.leaseSeconds=1", "/leaderElection/leaseSeconds"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(helm: Any, pair: str, path: str) -> None:
    done = helm("template", "r", str(CHART), "--set-json", pair)
    assert done.returncode != 0, f"{pair} was accepted"
    assert f"at '{path}'" in done.stderr


def test_every_value_is_used_by_a_template() -> None:
    text = "".join(p.read_text() for p in (CHART / "templates").iterdir())
    unused = [key for key in VALUES if f".Values.{key}" not in text]
    assert unused == []
