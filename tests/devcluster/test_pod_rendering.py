"""The pure half of the node: variables, volumes, names, status, container arguments."""

import base64
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devcluster import containerloop, containers, dockerfile, env, fields, hosts, images, volumes
from devcluster.errors import DevclusterError
from devcluster.podstatus import ContainerState, PodState, Terminated, render, resume
from devcluster.storage import volume_for
from devcluster.workload import parse_forward

POD = {
    "metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {"a": "1", "b": 'x"y\n'}},
    "spec": {"containers": [{"name": "c", "resources": {"limits": {"memory": "1Gi", "cpu": "250m"}}}]},
}
ADDRESSES = {"status.podIP": "10.244.1.2", "status.hostIP": "10.244.0.10"}
MAP = {"data": {"k": "v"}, "binaryData": {"raw": base64.b64encode(b"\xff\x00").decode()}}
SECRET = {"data": {"s": base64.b64encode(b"hidden").decode()}}


def sources(**objects):
    return env.Sources(POD, ADDRESSES, {tuple(key.split("_")): value for key, value in objects.items()})


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("250m", 0.25), ("1Gi", 2**30), ("1.5k", 1500), ("2e3", 2000), ("5E", 5e18), ("3Ei", 3 * 2**60)],
)
def test_quantities(text, value):
    assert fields.quantity(text) == value


def test_a_quantity_that_is_none_is_named():
    with pytest.raises(ValueError, match="'12 apples'"):
        fields.quantity("12 apples")


def test_expansion():
    values = {"A": "1", "B": "$(A)"}
    assert fields.expand("$(A) $(B) $(C) $$(A) $A", values) == "1 $(A) $(C) $(A) $A"


@given(st.text(alphabet=st.characters(exclude_characters="$")))
def test_text_without_a_dollar_is_left_alone(text):
    assert fields.expand(text, {"A": "x"}) == text


def test_field_references():
    assert fields.field_value(POD, "metadata.labels['a']", ADDRESSES) == "1"
    assert fields.field_value(POD, "metadata.labels['none']", ADDRESSES) == ""
    assert fields.field_value(POD, "metadata.labels", ADDRESSES) == 'a="1"\nb="x\\"y\\n"'
    assert fields.field_value(POD, "status.podIPs", ADDRESSES) == "10.244.1.2"
    with pytest.raises(ValueError, match=r"spec\.priority"):
        fields.field_value(POD, "spec.priority", ADDRESSES)


def test_resource_references_round_up():
    assert fields.resource_value(POD, {"resource": "limits.cpu"}, "c") == "1"
    assert fields.resource_value(POD, {"resource": "limits.cpu", "divisor": "1m"}, "c") == "250"
    assert fields.resource_value(POD, {"resource": "requests.memory", "divisor": "1Mi"}, "c") == "1024"


def test_variables_in_order():
    container = {
        "name": "c",
        "envFrom": [{"configMapRef": {"name": "m"}}, {"secretRef": {"name": "s"}, "prefix": "S_"}],
        "env": [
            {"name": "k", "value": "own"},
            {"name": "X", "value": "$(k)-$(BASE)-$(Y)"},
            {"name": "Y", "value": "y"},
        ],
    }
    built = env.build(container, sources(configmap_m=MAP, secret_s=SECRET), {"BASE": "b"})
    assert (built["k"], built["X"], built["S_s"]) == ("own", "own-b-$(Y)", "hidden")
    assert env.references(container) == {("configmap", "m"), ("secret", "s")}


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ({"name": "none", "key": "k"}, 'configmap "none" not found'),
        ({"name": "m", "key": "none"}, "couldn't find key none in ConfigMap ns/m"),
    ],
)
def test_missing_variables(ref, message):
    container = {"name": "c", "env": [{"name": "X", "valueFrom": {"configMapKeyRef": ref}}]}
    found = sources(configmap_m=MAP, configmap_none=None)
    with pytest.raises(env.ConfigError, match=message):
        env.build(container, found, {})
    ref["optional"] = True
    assert env.build(container, found, {}) == {}


def test_projected_files():
    volume = {
        "name": "v",
        "projected": {
            "defaultMode": 0o400,
            "sources": [
                {"configMap": {"name": "m", "items": [{"key": "k", "path": "a/b", "mode": 0o444}]}},
                {"secret": {"name": "s"}},
                {"downwardAPI": {"items": [{"path": "n", "fieldRef": {"fieldPath": "metadata.name"}}]}},
                {"serviceAccountToken": {"path": "t", "audience": "x", "expirationSeconds": 700}},
            ],
        },
    }
    assert volumes.tokens(volume) == [volumes.Token("t", "x", 700)]
    assert volumes.references(volume) == {("configmap", "m"), ("secret", "s")}
    content = volumes.files(volume, sources(configmap_m=MAP, secret_s=SECRET), {"t": "token"})
    expected = {"a/b": (b"v", 0o444), "s": (b"hidden", 0o400), "n": (b"p", 0o400), "t": (b"token", 0o400)}
    assert content == expected


def test_binary_keys_are_files_too():
    content = volumes.files({"name": "v", "configMap": {"name": "m"}}, sources(configmap_m=MAP), {})
    assert content["raw"][0] == b"\xff\x00"


def test_writing_swaps_the_whole_folder(tmp_path):
    start = datetime(2026, 1, 1, tzinfo=UTC)
    assert volumes.write(tmp_path, {"a": (b"1", 0o644), "d/b": (b"2", 0o600)}, start)
    assert (tmp_path / "d" / "b").read_bytes() == b"2"
    assert not volumes.write(tmp_path, {"a": (b"1", 0o644), "d/b": (b"2", 0o600)}, start.replace(year=2027))
    assert volumes.write(tmp_path, {"a": (b"3", 0o644)}, start.replace(year=2028))
    assert (tmp_path / "a").read_bytes() == b"3"
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("..")) == ["a"]
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("..2")]) == 1


def service(name, namespace="ns", address="10.96.0.9"):
    return {"metadata": {"name": name, "namespace": namespace}, "spec": {"clusterIP": address}}


def test_names():
    endpoint = {"addresses": ["10.244.1.7"], "hostname": "h", "conditions": {"ready": True}}
    waiting = {"addresses": ["10.244.1.8"], "conditions": {"ready": False}}
    slices = {"ns/head": [{"endpoints": [endpoint, waiting]}]}
    text = hosts.body([service("web"), service("head", address="None"), service("far", "other")], slices, "ns")
    table = {}
    for line in text.splitlines():
        address, *names = line.split()
        table |= dict.fromkeys(names, address)
    assert table["web"] == table["web.ns.svc.cluster.local"] == "10.96.0.9"
    assert table["head"] == table["h.head.ns.svc"] == "10.244.1.7"
    assert "far" not in table
    assert table["far.other"] == "10.96.0.9"
    assert "10.244.1.8" not in text


def test_own_lines():
    pod = {
        **POD,
        "spec": {"hostname": "h", "subdomain": "s", "hostAliases": [{"ip": "1.2.3.4", "hostnames": ["x", "y"]}]},
    }
    text = hosts.head(pod, "10.244.1.2")
    assert "10.244.1.2\th.s.ns.svc.cluster.local h\n" in text
    assert "1.2.3.4\tx y\n" in text


def test_a_hosts_file_keeps_its_inode(tmp_path):
    path = tmp_path / "hosts"
    hosts.write_in_place(path, "long text\n")
    before = path.stat().st_ino
    hosts.write_in_place(path, "x\n")
    assert (path.stat().st_ino, path.read_text()) == (before, "x\n")


def ended(code):
    return ContainerState("c", "i", None, terminated=Terminated(code, "x", "", "", ""))


@pytest.mark.parametrize(
    ("mains", "policy", "phase"),
    [
        ([ContainerState("c", "i")], "Never", "Pending"),
        ([ContainerState("c", "i", None)], "Never", "Running"),
        ([ended(0)], "Never", "Succeeded"),
        ([ended(0), ended(1)], "Never", "Failed"),
        ([ended(0), ContainerState("c", "i", None)], "Never", "Running"),
        ([ended(1)], "OnFailure", "Running"),
        ([ended(0)], "OnFailure", "Succeeded"),
        ([ended(0)], "Always", "Running"),
    ],
)
def test_phases(mains, policy, phase):
    assert PodState("1.1.1.1", [], mains, policy).phase() == phase


def test_init_containers_come_first():
    state = PodState("1.1.1.1", [ended(1)], [ContainerState("c", "i")], "Never")
    assert state.phase() == "Failed"
    state.restart_policy = "Always"
    assert state.phase() == "Pending"


def test_a_stopped_pod_ends_whatever_its_policy():
    state = PodState("1.1.1.1", [], [ended(0)], "Always", stopped=True)
    assert state.phase() == "Succeeded"
    state.mains.append(ContainerState("d", "i"))
    assert state.phase() == "Failed"


def test_transition_times_move_only_with_the_status():
    main = ContainerState("c", "i", None)
    state = PodState("1.1.1.1", [], [main], "Never", pod_ip="10.244.1.2")

    def ready(now):
        return next(each for each in render(state, now)["conditions"] if each["type"] == "Ready")

    assert ready("t1")["lastTransitionTime"] == "t1"
    assert (ready("t2")["lastTransitionTime"], ready("t2")["reason"]) == ("t1", "ContainersNotReady")
    main.ready = True
    assert (ready("t3")["lastTransitionTime"], ready("t3")["status"]) == ("t3", "True")


def test_a_lost_pod_is_taken_up_again():
    old = {"containerStatuses": [{"restartCount": 2, "state": {"running": {}}}]}
    again = PodState("1.1.1.1", [], [ContainerState("c", "i")], "Always")
    resume(again, old, "t")
    assert (again.mains[0].restarts, again.phase()) == (3, "Running")
    never = PodState("1.1.1.1", [], [ContainerState("c", "i")], "Never")
    resume(never, old, "t")
    assert never.phase() == "Failed"
    assert never.mains[0].terminated.exit_code == 137


@pytest.mark.parametrize(
    ("message", "log", "policy", "code", "shown"),
    [
        ("m", "log", "FallbackToLogsOnError", 1, "m"),
        ("", "log", "FallbackToLogsOnError", 1, "log"),
        ("", "log", "FallbackToLogsOnError", 0, ""),
        ("", "log", "File", 1, ""),
        ("m" * 5000, "", "File", 0, "m" * 4096),
        ("", "x\n" * 200, "FallbackToLogsOnError", 1, "x\n" * 80),
    ],
)
def test_termination_messages(message, log, policy, code, shown):
    assert containerloop.end_message(message, log, policy, code) == shown


def test_who_a_container_runs_as():
    image = images.Image("i", uid=1000)
    assert containerloop.owner(POD, {"name": "c"}, image) == containerloop.Owner(1000, 1000)
    pod = {**POD, "spec": {"securityContext": {"runAsUser": 7, "runAsNonRoot": True}}}
    assert containerloop.owner(pod, {"name": "c"}, image) == containerloop.Owner(7, 0)
    with pytest.raises(containerloop.Waiting, match="non-root"):
        containerloop.owner(pod, {"name": "c", "securityContext": {"runAsUser": 0}}, image)
    rootless = {**POD, "spec": {"securityContext": {"runAsNonRoot": True}}}
    with pytest.raises(containerloop.Waiting, match="image will run as root"):
        containerloop.owner(rootless, {"name": "c"}, images.Image("i", uid=0))


def test_command_lines():
    image = images.Image("i", entrypoint=("python", "-m", "x"))
    assert containerloop.argv({"args": ["$(A)"]}, image, {"A": "1"}) == ("python", "-m", "x", "1")
    assert containerloop.argv({"command": ["sh"]}, image, {}) == ("sh",)
    with pytest.raises(containerloop.Waiting, match="no command"):
        containerloop.argv({}, images.Image("i"), {})


def test_deeper_mounts_come_later():
    mounts = (containers.Mount("/s/deep", "/a/b", True), containers.Mount("/s/top", "/a"))
    launch = containers.Launch(("true",), images.Image("i"), {"K": "v"}, 1000, 1000, "h", "/etc-files", mounts)
    arguments = containers.bwrap_arguments(launch)
    assert arguments.index("/s/top") < arguments.index("/s/deep")
    assert arguments[arguments.index("/s/deep") - 1] == "--ro-bind"
    assert arguments[arguments.index("--setenv") :][:3] == ["--setenv", "K", "v"]
    assert arguments[-2:] == ["--", "true"]
    assert "--clearenv" in arguments


DOCKERFILE = """\
FROM a AS build
ENV LOST=1
FROM b
# a comment
ENV PATH=/opt/x/bin:$PATH \\
    HOME=/tmp
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["python", "-m", "thing"]
"""


def test_dockerfile_settings():
    found = dockerfile.parse(DOCKERFILE, "/opt/x", "/envs/y")
    assert found.environment == {"PATH": "/envs/y/bin:$PATH", "HOME": "/tmp"}
    assert (found.uid, found.workdir, found.entrypoint) == (1000, "/work", ["python", "-m", "thing"])


def test_image_options(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert images.parse_option(f"a/b:c={tmp_path}") == ("a/b:c", {"env": str(tmp_path)})
    assert images.parse_option(f"a={tmp_path}:12") == ("a", {"env": str(tmp_path), "uid": 12})
    for wrong in ("a", "=x", f"a={tmp_path}/none"):
        with pytest.raises(DevclusterError, match="--image"):
            images.parse_option(wrong)


def test_forward_options():
    assert parse_forward("9090=metrics.kube-system:80") == (9090, "kube-system/metrics", 80)
    assert parse_forward("9090=metrics.kube-system.svc:80") == (9090, "kube-system/metrics", 80)


def test_a_claims_volume(tmp_path):
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    claim = {"metadata": {"name": "c", "namespace": "ns", "uid": "u"}, "spec": spec}
    volume = volume_for(claim, tmp_path)
    assert volume["spec"]["claimRef"]["uid"] == "u"
    assert volume["spec"]["hostPath"]["path"] == str(tmp_path)
