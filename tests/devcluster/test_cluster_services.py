"""The cluster around the pods: network, names, storage, identities, jobs, faults."""

import base64
import json
import subprocess

import pytest

from devcluster.images import TOOLS

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("devcluster")]

ECHO = """
import http.server, socket
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(socket.gethostname().encode())
http.server.HTTPServer(("", 8000), H).serve_forever()
"""
FETCH = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1], timeout=5).read().decode())"
PYTHON = "/usr/bin/python3"


def serve(space, name):
    space.run(name, "", command=[PYTHON, "-c", ECHO], readinessProbe={"tcpSocket": {"port": 8000}, "periodSeconds": 1})
    space.kubectl("label", "pod", name, f"app={name}")
    for service, address in ((name, None), (f"{name}-headless", "None")):
        spec = {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8000}]}
        spec |= {"clusterIP": address} if address else {}
        space.apply({"kind": "Service", "metadata": {"name": service}, "spec": spec})
    space.kubectl("wait", f"pod/{name}", "--for=condition=Ready", "--timeout=60s")


def test_services_by_name(space):
    serve(space, "web")
    urls = ["http://web", f"http://web.{space.name}.svc", "http://web-headless:8000"]
    script = " && ".join(f"{PYTHON} -c '{FETCH}' {url}" for url in urls)
    wait = f"for h in web web-headless; do until getent hosts $h > /dev/null; do sleep 0.1; done; done; {script}"
    space.run("client", wait)
    assert space.finish("client") == "web\nweb\nweb\n"


def test_the_service_account_token_works_inside(space):
    script = """
import json, os, ssl, urllib.request
base = "/var/run/secrets/kubernetes.io/serviceaccount/"
context = ssl.create_default_context(cafile=base + "ca.crt")
url = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}/apis"
request = urllib.request.Request(url, headers={"Authorization": "Bearer " + open(base + "token").read()})
print(len(json.load(urllib.request.urlopen(request, context=context))["groups"]) > 5, open(base + "namespace").read())
"""
    space.run("inside", "", command=[PYTHON, "-c", script])
    assert space.finish("inside") == f"True {space.name}\n"


def test_tokens_have_an_audience_and_are_bound_to_the_pod(space):
    token = {"serviceAccountToken": {"path": "t", "audience": "posttrain", "expirationSeconds": 600}}
    spec = {"volumes": [{"name": "t", "projected": {"sources": [token]}}]}
    space.run("bearer", "cat /t/t; sleep 60", spec, volumeMounts=[{"name": "t", "mountPath": "/t"}])
    space.phase("bearer", "Running")
    text = space.wait(lambda: space.kubectl("logs", "bearer"))

    def review(audience):
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview"}
        body["spec"] = {"token": text, "audiences": [audience]}
        return json.loads(space.kubectl("create", "-f", "-", "-o", "json", stdin=json.dumps(body)))["status"]

    good = review("posttrain")
    assert good["authenticated"]
    assert good["user"]["extra"]["authentication.kubernetes.io/pod-name"] == ["bearer"]
    assert not review("somebody-else").get("authenticated")
    space.kubectl("delete", "pod", "bearer", "--grace-period=0", "--force")
    space.wait(lambda: not review("posttrain").get("authenticated"))


def test_a_node_reads_only_what_its_pods_name(space):
    space.apply({"kind": "Secret", "metadata": {"name": "private"}, "stringData": {"k": "v"}})
    as_node = ["--as=system:node:node-0", "--as-group=system:nodes"]
    assert "forbidden" in space.kubectl("get", "secret", "private", *as_node, check=False).lower()


def test_the_kubelet_port_is_closed_to_others(space):
    space.run("main", "sleep 60")
    space.phase("main", "Running")
    script = """
import ssl, urllib.request
context = ssl._create_unverified_context()
try:
    urllib.request.urlopen("https://10.244.0.10:10250/healthz", context=context, timeout=5)
except Exception as error:
    print("refused", type(error).__name__)
"""
    space.run("other", "", command=[PYTHON, "-c", script])
    assert space.finish("other").startswith("refused")


def claim(name, **annotations):
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    return {"kind": "PersistentVolumeClaim", "metadata": {"name": name, "annotations": annotations}, "spec": spec}


def mounting(name):
    spec = {"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": name}}]}
    return spec, {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}


def test_claims_bind_and_are_shared(space):
    space.apply(claim("data"))
    spec, mounts = mounting("data")
    space.run("writer", "echo kept > /v/f", spec, **mounts)
    space.phase("writer", "Succeeded")
    space.run("reader", "cat /v/f", spec, **mounts)
    assert space.finish("reader") == "kept\n"
    folder = space.cluster.ask("claims")[f"{space.name}/data"]
    with open(f"{folder}/f") as handle:
        assert handle.read() == "kept\n"


def test_a_claim_that_does_not_exist_is_unschedulable(space):
    spec, mounts = mounting("absent")
    space.run("stuck", "true", spec, **mounts)
    found = space.wait(
        lambda: [c for c in space.pod("stuck")["status"].get("conditions", []) if c["status"] == "False"]
    )
    assert found[0]["reason"] == "Unschedulable"
    assert 'persistentvolumeclaim "absent" not found' in found[0]["message"]


def test_a_limited_volume_fills_up_and_turns_read_only(space):
    space.apply(claim("small", **{"devcluster/size-limit": "4Mi"}))
    spec, mounts = mounting("small")
    space.run("box", "sleep 100", spec, **mounts)
    space.phase("box", "Running")
    write = ["exec", "box", "--", "sh", "-c", "echo x > /v/f"]
    space.kubectl(*write)
    ask, where = space.cluster.ask, {"namespace": space.name, "claim": "small"}
    ask("fill-volume", **where)
    assert "No space left" in space.kubectl("exec", "box", "--", "sh", "-c", "echo more | cat > /v/g", check=False)
    ask("empty-volume", **where)
    ask("read-only-volume", **where)
    assert "Read-only file system" in space.kubectl(*write, check=False)
    ask("writable-volume", **where)
    space.kubectl(*write)


def job(name, command, workers):
    container = {"name": "pytorch", "image": TOOLS, "command": ["sh", "-c", command]}
    container["resources"] = {"limits": {"nvidia.com/gpu": "4"}}
    replica = {"replicas": 1, "restartPolicy": "ExitCode", "template": {"spec": {"containers": [container]}}}
    specs = {"Master": replica} | ({"Worker": {**replica, "replicas": workers}} if workers else {})
    body = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": name}}
    return {**body, "spec": {"pytorchReplicaSpecs": specs}}


def test_a_job_of_two_pods_succeeds(space):
    space.apply(job("pair", "until getent hosts $MASTER_ADDR; do sleep 0.1; done; echo $RANK; sleep 2", 1))
    space.kubectl("wait", "pytorchjob/pair", "--for=condition=Succeeded", "--timeout=60s")
    assert "1\n" in space.kubectl("logs", "pair-worker-0", "-c", "pytorch")


def test_a_killed_worker_is_recreated_by_the_real_controller(space):
    space.apply(job("pair", "sleep 100", 1))
    space.kubectl("wait", "pytorchjob/pair", "--for=condition=Running", "--timeout=60s")
    space.wait(lambda: space.state("pair-worker-0").get("running"))
    before = space.pod("pair-worker-0")["metadata"]["uid"]
    peer = space.pod("pair-master-0")["metadata"]["uid"]
    space.cluster.ask("oom", namespace=space.name, pod="pair-worker-0")

    def recreated():
        found = space.cluster.get("pods", "-n", space.name)["items"]
        uids = {each["metadata"]["name"]: each["metadata"]["uid"] for each in found}
        return uids.get("pair-worker-0", before) != before and uids.get("pair-master-0") == peer

    space.wait(recreated)


def test_oom_kill_reads_as_one(space):
    space.run("big", "sleep 100")
    space.wait(lambda: space.state("big").get("running"))
    space.cluster.ask("oom", namespace=space.name, pod="big")
    space.phase("big", "Failed")
    ended = space.state("big")["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (137, "OOMKilled")


def test_a_signal_from_outside(space):
    space.run("caught", 'trap "exit 9" USR1; echo up; while :; do sleep 0.1; done')
    space.wait(lambda: space.state("caught").get("running") and "up" in space.kubectl("logs", "caught"))
    space.cluster.ask("kill", namespace=space.name, pod="caught", signal="USR1")
    space.phase("caught", "Failed")
    assert space.state("caught")["terminated"]["exitCode"] == 9


def test_a_refused_image(space):
    space.cluster.ask("refuse-image", image="devcluster/tools:dev")
    try:
        space.run("late", "echo ran")
        space.wait(lambda: space.state("late").get("waiting", {}).get("reason") == "ErrImagePull")
    finally:
        space.cluster.ask("allow-image", image="devcluster/tools:dev")
    assert space.finish("late") == "ran\n"


def test_gpus_are_counted(space):
    space.apply(job("large", "sleep 100", 5))
    space.wait(
        lambda: any("Insufficient nvidia.com/gpu" in str(pod["status"].get("conditions")) for pod in pods(space))
    )
    running = [pod for pod in pods(space) if pod["spec"].get("nodeName")]
    assert len(running) <= 4  # two nodes with 8 GPUs, 4 each


def pods(space):
    return space.cluster.get("pods", "-n", space.name)["items"]


def test_no_process_of_the_host_is_visible(space):
    space.run("alone", "ls -d /proc/[0-9]* | wc -l")
    assert int(space.finish("alone")) <= 4


def test_kubeconfig_is_private(space):
    mode = subprocess.run(
        ["stat", "-c", "%a", str(space.cluster.kubeconfig)], capture_output=True, text=True, check=True
    )
    assert mode.stdout.strip() == "600"
    assert base64.b64encode(b"-----BEGIN")[:8].decode() in space.cluster.kubeconfig.read_text()
