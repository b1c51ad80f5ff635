"""The operator's rights, word for word. A right more is a finding, a right less is an operator that does not work."""

import re
from pathlib import Path
from typing import Any

import pytest

SECURITY = Path(__file__).parents[2] / "SECURITY.md"

Object = dict[str, Any]
Rights = set[tuple[str, str, str]]

READ = ("get", "list", "watch")
WATCHED = {
    ("posttrain.dev", "posttrainingjobs"): READ,
    ("posttrain.dev", "posttrainingjobs/status"): ("patch",),
    ("posttrain.dev", "posttrainingjobs/finalizers"): ("update",),
    ("kubeflow.org", "pytorchjobs"): (*READ, "create", "patch", "delete"),
    ("trainer.kubeflow.org", "trainjobs"): (*READ, "create", "patch", "delete"),
    ("trainer.kubeflow.org", "trainingruntimes"): ("get", "create", "delete"),
    ("", "pods"): (*READ, "delete"),
    ("", "configmaps"): (*READ, "create", "patch", "delete"),
    ("", "persistentvolumeclaims"): (*READ, "create"),
    ("", "events"): READ,
    ("events.k8s.io", "events"): ("create", "patch"),
}
CLUSTER = {("authentication.k8s.io", "tokenreviews"): ("create",), ("", "nodes"): READ}
OWN = {("", "secrets"): ("get", "update")}
LEASE = {("coordination.k8s.io", "leases"): ("create", "get", "update")}
OWN_ROLES = {"release-posttrain-operator-status", "release-posttrain-operator-lease"}
OPERATOR_ROLES = {"release-posttrain-operator", "release-posttrain-operator-cluster"}


def rights(role: Object) -> Rights:
    """A role's rules as (group, resource, verb)."""
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def flat(table: dict[tuple[str, str], tuple[str, ...]]) -> Rights:
    return {(*key, verb) for key, verbs in table.items() for verb in verbs}


def named(objects: list[Object], kind: str) -> dict[str, Object]:
    return {item["metadata"]["name"]: item for item in objects if item["kind"] == kind}


def test_the_operators_rights_are_exactly_these(default: list[Object]) -> None:
    roles = named(default, "ClusterRole")
    assert rights(roles["release-posttrain-operator"]) == flat(WATCHED)
    assert rights(roles["release-posttrain-operator-cluster"]) == flat(CLUSTER)
    own = named(default, "Role")
    assert set(own) == OWN_ROLES
    assert rights(own["release-posttrain-operator-status"]) == flat(OWN)
    assert rights(own["release-posttrain-operator-lease"]) == flat(LEASE)


def test_the_security_page_says_all_rights(default: list[Object]) -> None:
    """Word for word here too, API groups aside: who reads the page must not have to read the chart."""
    roles = {**named(default, "ClusterRole"), **named(default, "Role")}
    granted: dict[str, set[str]] = {}
    for _, resource, verb in set().union(*(rights(roles[name]) for name in OPERATOR_ROLES | OWN_ROLES)):
        granted.setdefault(resource, set()).add(verb)
    section = SECURITY.read_text().split("## What the operator may do")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([A-Za-z/]+) \| ([a-z, ]+) \|", section, re.MULTILINE)
    assert {what.lower(): set(verbs.split(", ")) for what, verbs in rows if what != "what"} == granted


def test_the_one_secret_is_named_and_made_by_the_chart(default: list[Object]) -> None:
    role = named(default, "Role")["release-posttrain-operator-status"]
    assert [rule["resourceNames"] for rule in role["rules"]] == [list(named(default, "Secret"))]


def test_the_lease_is_one_by_name_in_its_own_namespace(default: list[Object]) -> None:
    """What does not exist yet has no name to the API server: creating cannot be narrowed."""
    role = named(default, "Role")["release-posttrain-operator-lease"]
    assert role["metadata"]["namespace"] == "posttrain-system"
    assert {tuple(rule["verbs"]): rule.get("resourceNames") for rule in role["rules"]} == {
        ("create",): None,
        ("get", "update"): ["release-posttrain-operator"],
    }
    assert not [o for o in default if o["kind"] == "ClusterRole" and "leases" in str(o["rules"])]


def test_nothing_is_granted_on_everything(default: list[Object]) -> None:
    for item in default:
        for rule in item.get("rules", ()):
            assert "*" not in str(rule), item["metadata"]["name"]
            assert "secrets" not in rule["resources"] or rule.get("resourceNames")
            assert not {"pods/exec", "pods/log", "nodes/proxy", "serviceaccounts/token"} & set(rule["resources"])


def test_every_role_of_the_operator_is_bound_to_it_alone(default: list[Object]) -> None:
    bindings = [*named(default, "ClusterRoleBinding").values(), *named(default, "RoleBinding").values()]
    assert {b["roleRef"]["name"] for b in bindings} == OPERATOR_ROLES | OWN_ROLES
    account = {"kind": "ServiceAccount", "name": "release-posttrain-operator", "namespace": "posttrain-system"}
    assert all(b["subjects"] == [account] for b in bindings)


def test_a_list_of_namespaces_narrows_the_rights(render: Any) -> None:
    objects = render('watchNamespaces=["team-a","team-b"]')
    assert set(named(objects, "ClusterRoleBinding")) == {"release-posttrain-operator-cluster"}
    places = {
        b["metadata"]["namespace"]
        for b in objects
        if b["kind"] == "RoleBinding" and b["roleRef"]["kind"] == "ClusterRole"
    }
    assert places == {"team-a", "team-b"}


def test_without_the_status_server_its_rights_are_gone(render: Any) -> None:
    objects = render("statusServer.enabled=false")
    assert not named(objects, "Secret")
    assert set(named(objects, "Role")) == set(named(objects, "RoleBinding")) == {"release-posttrain-operator-lease"}
    assert ("authentication.k8s.io", "tokenreviews", "create") not in rights(
        named(objects, "ClusterRole")["release-posttrain-operator-cluster"]
    )


def test_without_rbac_no_role_of_the_operator_is_made(render: Any) -> None:
    objects = render("rbac.create=false")
    assert not [o for o in objects if o["kind"].endswith("Binding") or o["kind"] == "Role"]
    assert not OPERATOR_ROLES & set(named(objects, "ClusterRole"))


@pytest.mark.parametrize("aggregate", [True, False])
def test_readers_read_and_editors_write_jobs_but_nobody_their_status(render: Any, aggregate: bool) -> None:
    roles = named(render(f"rbac.aggregateToDefaultRoles={str(aggregate).lower()}"), "ClusterRole")
    view, edit = roles["release-posttrain-operator-view"], roles["release-posttrain-operator-edit"]
    jobs = ("posttrain.dev", "posttrainingjobs")
    assert rights(view) == flat({jobs: READ, ("posttrain.dev", "posttrainingjobs/status"): READ})
    assert rights(edit) == flat({jobs: ("create", "delete", "deletecollection", "patch", "update")})
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    targets = [{k.removeprefix(prefix) for k in r["metadata"]["labels"] if k.startswith(prefix)} for r in (view, edit)]
    assert targets == ([{"view", "edit", "admin"}, {"edit", "admin"}] if aggregate else [set(), set()])
