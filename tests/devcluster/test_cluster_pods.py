"""What a pod may expect of the node: its life, its end, its volumes, variables and probes."""

import time

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("devcluster")]


def test_exit_code_message_and_log(space):
    space.run("bad", "echo said; echo why > /dev/termination-log; exit 7")
    assert space.finish("bad") == "said\n"
    ended = space.state("bad")["terminated"]
    assert (ended["exitCode"], ended["reason"], ended["message"]) == (7, "Error", "why\n")


def test_termination_message_falls_back_to_the_log(space):
    space.run("bad", "echo last words; exit 3", terminationMessagePolicy="FallbackToLogsOnError")
    space.finish("bad")
    assert space.state("bad")["terminated"]["message"] == "last words\n"


def test_command_that_does_not_exist(space):
    space.run("bad", "", command=["/no/such/program"])
    space.phase("bad", "Failed")
    ended = space.state("bad")["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (128, "StartError")
    assert "/no/such/program" in ended["message"]


def test_restart_policy_on_failure(space):
    volume = {"volumes": [{"name": "v", "emptyDir": {}}], "restartPolicy": "OnFailure"}
    script = "test -e /v/x && exit 0; touch /v/x; exit 1"
    space.run("again", script, volume, volumeMounts=[{"name": "v", "mountPath": "/v"}])
    space.phase("again", "Succeeded")
    status = space.pod("again")["status"]["containerStatuses"][0]
    assert status["restartCount"] == 1
    assert status["lastState"]["terminated"]["exitCode"] == 1


def test_crash_loop_backs_off(space):
    space.run("loop", "exit 1", {"restartPolicy": "Always"})
    space.wait(lambda: space.state("loop").get("waiting", {}).get("reason") == "CrashLoopBackOff")
    assert space.pod("loop")["status"]["phase"] == "Running"


def test_term_is_sent_before_kill(space):
    space.run("calm", 'trap "echo asked; exit 0" TERM; echo up; while :; do sleep 0.1; done')
    space.phase("calm", "Running")
    space.wait(lambda: "up" in space.kubectl("logs", "calm"))
    space.kubectl("annotate", "pod", "calm", "x=y")
    space.kubectl("patch", "pod", "calm", "--type=merge", "-p", '{"metadata":{"finalizers":["test/keep"]}}')
    space.kubectl("delete", "pod", "calm", "--wait=false")
    space.phase("calm", "Succeeded")
    assert space.state("calm")["terminated"]["exitCode"] == 0
    assert "asked" in space.kubectl("logs", "calm")
    space.kubectl("patch", "pod", "calm", "--type=merge", "-p", '{"metadata":{"finalizers":[]}}')


def test_deaf_container_is_killed_after_grace(space):
    space.run("deaf", 'trap "" TERM; echo up; while :; do sleep 0.1; done')
    space.phase("deaf", "Running")
    started = time.monotonic()
    space.kubectl("delete", "pod", "deaf", "--grace-period=2")
    assert 1.5 < time.monotonic() - started < 10


def test_a_pod_that_has_another_address_than_before_is_reported(space):
    """As after its node was lost and came back: two addresses of one family are refused."""
    space.run("moved", "sleep 1000")
    space.phase("moved", "Running")
    before = '{"status":{"podIP":"10.244.9.9","podIPs":[{"ip":"10.244.9.9"}]}}'
    space.kubectl("patch", "pod", "moved", "--subresource=status", "--type=merge", "-p", before)
    space.kubectl("delete", "pod", "moved", "--grace-period=1", "--timeout=20s")


def test_init_containers_run_in_order_and_fail_the_pod(space):
    init = [
        {"name": "one", "image": "devcluster/tools:dev", "command": ["sh", "-c", "echo one > /v/log"]},
        {"name": "two", "image": "devcluster/tools:dev", "command": ["sh", "-c", "echo two >> /v/log; cat /v/log"]},
    ]
    for each in init:
        each["volumeMounts"] = [{"name": "v", "mountPath": "/v"}]
    spec = {"initContainers": init, "volumes": [{"name": "v", "emptyDir": {}}]}
    space.run("good", "cat /v/log", spec, volumeMounts=[{"name": "v", "mountPath": "/v"}])
    assert space.finish("good") == "one\ntwo\n"
    init[0]["command"] = ["sh", "-c", "exit 4"]
    space.run("bad", "echo never", spec, volumeMounts=[{"name": "v", "mountPath": "/v"}])
    space.phase("bad", "Failed")
    assert space.pod("bad")["status"]["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 4
    assert "running" not in space.state("bad")


def test_volumes(space):
    space.apply({"kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"a": "from-map", "b": "other"}})
    space.apply({"kind": "Secret", "metadata": {"name": "s"}, "stringData": {"k": "hidden"}})
    label = {"path": "label", "fieldRef": {"fieldPath": "metadata.name"}}
    volumes = [
        {"name": "empty", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}},
        {"name": "map", "configMap": {"name": "c", "items": [{"key": "a", "path": "deep/a"}]}},
        {"name": "secret", "secret": {"secretName": "s", "defaultMode": 0o400}},
        {"name": "down", "downwardAPI": {"items": [label]}},
        {"name": "all", "projected": {"sources": [{"configMap": {"name": "c"}}, {"secret": {"name": "s"}}]}},
        {"name": "maybe", "configMap": {"name": "absent", "optional": True}},
    ]
    mounts = [{"name": each["name"], "mountPath": f"/m/{each['name']}"} for each in volumes]
    mounts[1]["mountPath"] = "/dev/shm"
    mounts += [
        {"name": "map", "mountPath": "/etc/one-file", "subPath": "deep/a"},
        {"name": "empty", "mountPath": "/m/sub", "subPath": "x/y"},
        {"name": "empty", "mountPath": "/m/readonly", "readOnly": True},
    ]
    script = """
    cat /m/map/deep/a /m/secret/k /m/down/label /m/all/b /etc/one-file; echo
    ls /m/maybe | wc -l; stat -L -c %a /m/secret/k; df -k --output=size /dev/shm | tail -1
    touch /m/sub/file; ls /m/empty/x/y; touch /m/map/x 2>&1; touch /m/readonly/x 2>&1
    """
    space.run("vols", script, {"volumes": volumes}, volumeMounts=mounts)
    lines = space.finish("vols").split("\n")
    assert lines[0] == "from-maphiddenvolsotherfrom-map"
    assert [line.strip() for line in lines[1:5]] == ["0", "400", "8192", "file"]
    assert "Read-only file system" in lines[5]
    assert "Read-only file system" in lines[6]


def test_config_map_updates_reach_the_container(space):
    space.apply({"kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"a": "old"}})
    spec = {"volumes": [{"name": "v", "configMap": {"name": "c"}}]}
    script = "until grep -q new /v/a; do sleep 0.1; done; cat /v/a"
    space.run("follow", script, spec, volumeMounts=[{"name": "v", "mountPath": "/v"}])
    space.phase("follow", "Running")
    space.apply({"kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"a": "new"}})
    space.wait(lambda: space.pod("follow")["status"]["phase"] == "Succeeded", 60)


def test_variables(space):
    space.apply({"kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"KEY": "mapped"}})
    space.apply({"kind": "Secret", "metadata": {"name": "s"}, "stringData": {"k": "hidden"}})
    env = [
        {"name": "A", "value": "a"},
        {"name": "B", "value": "$(A)-$$(A)-$(NONE)"},
        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "S", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
        {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
    ]
    from_map = [{"configMapRef": {"name": "c"}, "prefix": "P_"}]
    script = 'echo "$A $B $POD $S $CPU $P_KEY $0"; hostname -I 2>/dev/null; echo $IP'
    command = ["sh", "-c", script, "$(A)"]
    space.run("vars", "", env=env, envFrom=from_map, command=command, resources={"limits": {"cpu": "1500m"}})
    lines = space.finish("vars").splitlines()
    assert lines[0] == "a a-$(A)-$(NONE) vars hidden 2 mapped a"
    assert lines[-1] == space.pod("vars")["status"]["podIP"]


def test_missing_objects_hold_the_pod_up(space):
    env = [{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "later", "key": "k"}}}]
    space.run("env", "echo $X", env=env)
    waiting = space.wait(lambda: space.state("env").get("waiting", {}).get("reason") == "CreateContainerConfigError")
    assert waiting
    assert 'configmap "later" not found' in space.state("env")["waiting"]["message"]
    spec = {"volumes": [{"name": "v", "secret": {"secretName": "later"}}]}
    space.run("vol", "cat /v/k", spec, volumeMounts=[{"name": "v", "mountPath": "/v"}])
    space.wait(lambda: any("FailedMount" in each and '"later" not found' in each for each in space.events("vol")))
    space.apply({"kind": "ConfigMap", "metadata": {"name": "later"}, "data": {"k": "came"}})
    space.apply({"kind": "Secret", "metadata": {"name": "later"}, "stringData": {"k": "came too"}})
    assert space.finish("env") == "came\n"
    assert space.finish("vol") == "came too"


def test_unknown_image_waits_like_a_failed_pull(space):
    space.run("none", "true", image="no/such:image")
    for reason in ("ErrImagePull", "ImagePullBackOff"):
        space.wait(lambda r=reason: space.state("none").get("waiting", {}).get("reason") == r)


def test_root_is_refused_where_non_root_is_asked(space):
    space.run("root", "id", securityContext={"runAsUser": 0, "runAsNonRoot": True})
    space.wait(lambda: space.state("root").get("waiting", {}).get("reason") == "CreateContainerConfigError")
    space.run("user", "id -u; id -g", {"securityContext": {"runAsUser": 4321, "runAsGroup": 55}})
    assert space.finish("user") == "4321\n55\n"


def test_read_only_root(space):
    volume = {"volumes": [{"name": "t", "emptyDir": {}}]}
    script = "touch /tmp/ok && touch /x 2>&1; touch /home/nonroot/x 2>&1; ls /root /work 2>&1"
    mount = [{"name": "t", "mountPath": "/tmp"}]
    space.run("ro", script, volume, volumeMounts=mount, securityContext={"readOnlyRootFilesystem": True})
    log = space.finish("ro")
    assert log.count("Read-only file system") == 2
    assert log.count("No such file or directory") == 2  # nothing else of this machine is there


def test_probes(space):
    ready = {"exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 1}
    space.run("probed", "echo up; sleep 2; touch /tmp/ready; sleep 60", readinessProbe=ready)
    space.phase("probed", "Running")
    assert not space.pod("probed")["status"]["containerStatuses"][0]["ready"]
    space.kubectl("wait", "pod/probed", "--for=condition=Ready", "--timeout=60s")
    live = {"tcpSocket": {"port": 9}, "periodSeconds": 1, "failureThreshold": 1}
    space.run("dead", "sleep 60", {"restartPolicy": "OnFailure"}, livenessProbe=live)
    space.wait(lambda: (space.pod("dead")["status"].get("containerStatuses") or [{}])[0].get("restartCount", 0) > 0)
    assert any("Unhealthy: Liveness probe failed: dial tcp" in each for each in space.events("dead"))


def test_a_status_that_somebody_else_changed_is_put_right(space):
    space.run("honest", "sleep 60")
    space.kubectl("wait", "pod/honest", "--for=condition=Ready", "--timeout=60s")
    false = '{"status":{"conditions":[{"type":"Ready","status":"False"}]}}'
    space.kubectl("patch", "pod", "honest", "--subresource=status", "-p", false)
    space.kubectl("wait", "pod/honest", "--for=condition=Ready", "--timeout=60s")


def test_http_probe(space):
    script = "import http.server; http.server.test(http.server.SimpleHTTPRequestHandler, port=8000)"
    probe = {"httpGet": {"path": "/", "port": "web"}, "periodSeconds": 1}
    space.run(
        "web",
        "",
        command=["/usr/bin/python3", "-c", script],
        ports=[{"name": "web", "containerPort": 8000}],
        readinessProbe=probe,
        workingDir="/tmp",
    )
    space.kubectl("wait", "pod/web", "--for=condition=Ready", "--timeout=60s")


def test_logs_follow_tail_and_previous(space):
    space.run("talk", "for i in 1 2 3; do echo $i; sleep 0.5; done; exit 1", {"restartPolicy": "OnFailure"})
    space.phase("talk", "Running")
    assert space.kubectl("logs", "-f", "talk") == "1\n2\n3\n"
    space.wait(lambda: space.pod("talk")["status"]["containerStatuses"][0]["restartCount"] == 1)
    assert space.kubectl("logs", "talk", "--previous", "--tail=1") == "3\n"


def test_exec(space):
    space.run("box", "sleep 60", env=[{"name": "MARK", "value": "here"}])
    space.phase("box", "Running")
    assert space.kubectl("exec", "box", "--", "sh", "-c", "echo $MARK; hostname") == "here\nbox\n"
    assert space.kubectl("exec", "-i", "box", "--", "cat", stdin="through\n") == "through\n"
    assert "exit code 5" in space.kubectl("exec", "box", "--", "sh", "-c", "exit 5", check=False)


def test_a_replaced_pod_keeps_nothing_of_the_old_one(space):
    space.run("same", "echo first; sleep 60")
    space.phase("same", "Running")
    space.kubectl("delete", "pod", "same", "--grace-period=0", "--force")
    space.run("same", "echo second")
    assert space.finish("same") == "second\n"
