"""s3:// and gs:// sources from real servers that check signatures (stores_rig.py), by the client the trainer uses."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prepare_kit import job, model_folder, pairs, run_module, write_config, write_jsonl
from stores_kit import PYTHON, RIG, Stores

from posttrain_api import names
from posttrain_api.places import Source
from posttrain_api.reasons import Reason
from posttrain_api.trainer import DataSource, ModelConfig
from posttrain_trainer import buckets, listings, object_store
from posttrain_trainer.errors import TrainerFailure, classify
from posttrain_trainer.fetch import Fetched, Fetcher
from posttrain_trainer.kinds import Kind
from posttrain_trainer.prepared import read_manifest
from posttrain_trainer.ranks import child_environment

BOTH = pytest.mark.parametrize("scheme", ["s3", "gs"])
pytestmark = [
    pytest.mark.xdist_group("object-store"),
    pytest.mark.skipif(not PYTHON.exists(), reason="the servers are not installed: make stores"),
]


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seed")
    write_jsonl(folder / "data" / "sets" / "train.jsonl", pairs(40))
    for i in range(3):
        write_jsonl(folder / "data" / "sets" / "shards" / f"part-{i}.jsonl", pairs(10))
    write_jsonl(folder / "data" / "sets" / "shards" / "deeper" / "part with ünicode.jsonl", pairs(1))
    write_jsonl(folder / "data" / "sets" / "shards" / "_SUCCESS.jsonl", ["not data"])
    write_jsonl(folder / "data" / "sets" / "shards" / "notes.md", ["no rows"])
    (folder / "data" / "sets" / "empty").mkdir()
    write_jsonl(folder / "data" / "docs" / "readme.md", ["no rows"])
    model_folder(folder / "data" / "tiny")
    (folder / "data" / "tiny" / "pytorch_model.bin").write_bytes(b"the same weights again")
    (folder / "data" / "tiny" / "modeling.py").write_text("raise SystemExit('remote code')")
    write_jsonl(folder / "public" / "rows.jsonl", pairs(4))
    return folder


@pytest.fixture(scope="module")
def stores(seed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stores]:
    command = [str(PYTHON), str(RIG), str(seed), str(tmp_path_factory.mktemp("tls") / "ca.pem")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rig:
        assert rig.stdout is not None
        yield Stores(json.loads(rig.stdout.readline()), tmp_path_factory.mktemp("secrets"))
        assert rig.stdin is not None
        rig.stdin.close()


@pytest.fixture(autouse=True)
def no_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of this machine's is asked or used, and failing takes seconds."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "GCS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("GCE_METADATA_ROOT", "127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(buckets, "ATTEMPTS", 2)
    monkeypatch.setattr(buckets, "RETRY_SECONDS", 1)


def fetch(root: Path, uri: str, secret: str | None, kind: Kind = "dataset") -> Fetched:
    make = Source if kind == "model" else DataSource
    return Fetcher(root / "hub").fetch(make(uri=uri, secret_path=secret), kind)


def files(fetched: Fetched) -> list[str]:
    return sorted(str(path.relative_to(fetched.path)) for path in fetched.path.rglob("*") if path.is_file())


def refused(root: Path, uri: str, secret: str | None, kind: Kind = "dataset") -> tuple[Reason, str]:
    try:
        fetched = fetch(root, uri, secret, kind)
    except (TrainerFailure, OSError) as error:
        return classify(error)
    raise AssertionError(f"fetched {fetched}")


@BOTH
def test_one_file(stores: Stores, seed: Path, tmp_path: Path, scheme: str) -> None:
    fetched = fetch(tmp_path, f"{scheme}://data/sets/train.jsonl", stores.good(scheme))
    assert fetched.path.name == "train.jsonl"
    assert fetched.path.read_bytes() == (seed / "data/sets/train.jsonl").read_bytes()
    assert fetched.revision is not None
    assert len(fetched.revision) == len("sha256:") + 64
    assert "GOOGLE_APPLICATION_CREDENTIALS" not in os.environ


@BOTH
@pytest.mark.parametrize("slash", ["", "/"])
def test_folder_of_shards(stores: Stores, tmp_path: Path, scheme: str, slash: str) -> None:
    """Folder markers, hidden files and files that are no data stay behind."""
    fetched = fetch(tmp_path, f"{scheme}://data/sets/shards{slash}", stores.good(scheme))
    assert files(fetched) == ["deeper/part with ünicode.jsonl", "part-0.jsonl", "part-1.jsonl", "part-2.jsonl"]


@BOTH
def test_model_folder(stores: Stores, tmp_path: Path, scheme: str) -> None:
    found = files(fetch(tmp_path, f"{scheme}://data/tiny", stores.good(scheme), "model"))
    assert set(found) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not {"pytorch_model.bin", "modeling.py"} & set(found)


@BOTH
def test_code_comes_only_where_it_may_run(stores: Stores, tmp_path: Path, scheme: str) -> None:
    source = Source(uri=f"{scheme}://data/tiny", secret_path=stores.good(scheme))
    assert "modeling.py" in files(Fetcher(tmp_path, trust_remote_code=True).fetch(source, "model"))


def test_keys_of_a_session(stores: Stores, tmp_path: Path) -> None:
    fetch(tmp_path, "s3://data/sets/train.jsonl", stores.s3_secret("session"))
    reason, message = refused(
        tmp_path, "s3://data/sets/shards", stores.s3_secret("session", AWS_SESSION_TOKEN="x", AWS_REGION="eu-west-1")
    )
    assert reason == Reason.DATASET_NOT_FOUND, message
    assert "access denied" in message


def test_keys_that_may_read_one_object_and_list_nothing(stores: Stores, tmp_path: Path) -> None:
    secret = stores.s3_secret("blind")
    assert fetch(tmp_path, "s3://data/sets/train.jsonl", secret).path.is_file()
    assert "ListObjects" in refused(tmp_path, "s3://data/sets/shards", secret)[1]


@BOTH
def test_public_bucket_without_a_secret(
    stores: Stores, tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", stores.url("s3"))
    monkeypatch.setenv("GCS_ENDPOINT_URL", stores.url("gs"))
    assert fetch(tmp_path, f"{scheme}://public/rows.jsonl", None).path.is_file()
    reason, message = refused(tmp_path, f"{scheme}://data/sets/train.jsonl", None, "model")
    assert reason == Reason.MODEL_ACCESS_DENIED
    assert "without credentials" in message
    assert "secretRef" in message


def test_the_pods_own_identity_on_s3(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**stores.facts["s3"]["users"]["all"], "AWS_ENDPOINT_URL": stores.url("s3")}.items():
        monkeypatch.setenv(name, value)
    assert fetch(tmp_path, "s3://data/sets/train.jsonl", None).path.is_file()


def test_the_pods_own_identity_on_google(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCS_ENDPOINT_URL", stores.url("gs"))
    monkeypatch.setenv("GCE_METADATA_ROOT", stores.facts["gs"]["metadata"])
    assert fetch(tmp_path, "gs://data/sets/train.jsonl", None).path.is_file()


def test_wrong_secret(stores: Stores, tmp_path: Path) -> None:
    wrong = stores.s3_secret("all", AWS_SECRET_ACCESS_KEY="wrong-key-of-somebody")
    reason, message = refused(tmp_path, "s3://data/tiny", wrong, "model")
    assert reason == Reason.MODEL_ACCESS_DENIED
    assert "SIGNATURE_DOES_NOT_MATCH" in message
    assert "wrong-key" not in message
    other = dict(stores.facts["gs"]["credentials"], private_key="none of yours")
    keys = {"credentials.json": json.dumps(other), "GCS_ENDPOINT_URL": stores.url("gs")}
    reason, message = refused(tmp_path, "gs://data/tiny", stores.secret("gs-wrong", keys), "model")
    assert reason == Reason.MODEL_ACCESS_DENIED
    assert "none of yours" not in message


@pytest.mark.parametrize(
    ("scheme", "key"), [("s3", "AWS_ACCESS_KEY_ID"), ("s3", "AWS_SECRET_ACCESS_KEY"), ("gs", "credentials.json")]
)
def test_secret_without_a_key(stores: Stores, tmp_path: Path, scheme: str, key: str) -> None:
    keys = {name: "x" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "credentials.json") if name != key}
    reason, message = refused(tmp_path, f"{scheme}://data/x", stores.secret(f"no-{key}", keys), "model")
    assert (reason, f"no key `{key}`" in message) == (Reason.MODEL_ACCESS_DENIED, True)


@BOTH
@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("data/sets/trian.jsonl", "there is no 'trian.jsonl'. The folder {}://data/sets has train.jsonl"),
        ("data/stes/train.jsonl", "there is no 'stes'"),
        ("data/sets/train.jsonl/", "there is no 'train.jsonl'"),
        ("data/sets/empty", "there is no object below it"),
        ("data/docs", "no data file"),
    ],
)
def test_missing(stores: Stores, tmp_path: Path, scheme: str, path: str, part: str) -> None:
    reason, message = refused(tmp_path, f"{scheme}://{path}", stores.good(scheme))
    assert reason == Reason.DATASET_NOT_FOUND
    assert part.format(scheme) in message
    assert f"{scheme}://{path}" in message


def test_missing_bucket(stores: Stores, tmp_path: Path) -> None:
    reason, message = refused(tmp_path, "gs://dada/x", stores.good("gs"), "model")
    assert (reason, "there is no bucket 'dada'" in message) == (Reason.MODEL_NOT_FOUND, True)


def test_bucket_in_another_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(301)
            self.send_header("x-amz-bucket-region", "eu-west-1")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        reason, message = refused(tmp_path, "s3://data/x", None)
        server.shutdown()
    assert (reason, "Set AWS_REGION" in message) == (Reason.DATASET_NOT_FOUND, True)


@BOTH
def test_unreachable(stores: Stores, tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "AWS_ENDPOINT_URL" if scheme == "s3" else "GCS_ENDPOINT_URL"
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    reason, message = refused(tmp_path, f"{scheme}://data/x", None)
    assert (reason, "http://127.0.0.1:9" in message) == (Reason.TRAINER_ERROR, True)


@BOTH
def test_an_attempt_that_was_cut_off_goes_on(stores: Stores, seed: Path, tmp_path: Path, scheme: str) -> None:
    uri, secret = f"{scheme}://data/sets/shards", stores.good(scheme)
    stores.control(scheme, "_fail/part-2")
    reason, message = refused(tmp_path, uri, secret)
    stores.control(scheme, "_fail/")
    assert reason == Reason.TRAINER_ERROR
    assert "out of order" in message or "500" in message
    partly = {path.name for path in tmp_path.rglob("part*.jsonl")}
    assert "part-0.jsonl" in partly
    assert "part-2.jsonl" not in partly
    before = len(stores.control(scheme, "_log"))
    fetched = fetch(tmp_path, uri, secret)
    asked = [line for line in stores.control(scheme, "_log")[before:] if "prefix" not in line]
    assert asked
    assert not any(name in line for name in partly for line in asked), "what is whole is not fetched again"
    assert (fetched.path / "part-2.jsonl").read_bytes() == (seed / "data/sets/shards/part-2.jsonl").read_bytes()
    before = len(stores.control(scheme, "_log"))
    assert fetch(tmp_path, uri, secret) == fetched
    assert len(stores.control(scheme, "_log")) == before, "a later attempt asks nothing"


def test_what_changed_before_an_attempt_was_whole_is_fetched_anew(stores: Stores, tmp_path: Path) -> None:
    uri, secret = "s3://data/sets/shards", stores.good("s3")
    fetched = fetch(tmp_path, uri, secret)
    listing = fetched.path.parent / listings.LISTING
    kept = listings.Listing.read(listing)
    assert kept is not None
    old = tuple(dataclasses.replace(item, written=0) if "part-0" in item.name else item for item in kept.items)
    listing.write_text(listings.Listing(False, old).to_json())
    (fetched.path / "part-1.jsonl").unlink()
    (fetched.path / "part-0.jsonl").write_bytes(b"x" * (fetched.path / "part-0.jsonl").stat().st_size)
    assert fetch(tmp_path, uri, secret) == fetched
    assert (fetched.path / "part-0.jsonl").read_text().startswith('{"prompt"')


def test_change_while_it_is_read(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = iter([b"one", b"other"])
    monkeypatch.setattr(object_store._Download, "_tag", lambda *_: next(tags))
    reason, message = refused(tmp_path, "s3://data/sets/train.jsonl", stores.good("s3"))
    assert (reason, "changed while" in message) == (Reason.TRAINER_ERROR, True)
    assert not list(tmp_path.rglob("train.jsonl"))


def test_full_storage(stores: Stores, tmp_path: Path) -> None:
    wanted = object_store.Wanted(DataSource(uri="s3://data/sets/train.jsonl", secret_path=stores.good("s3")), "dataset")
    place = wanted.folder(tmp_path / "hub") / object_store.FILES
    place.mkdir(parents=True)
    (place / "train.jsonl.part").symlink_to("/dev/full")
    assert refused(tmp_path, wanted.source.uri, wanted.source.secret_path)[0] == Reason.STORAGE_FULL


def test_key_that_would_leave_the_folder(tmp_path: Path) -> None:
    wanted = object_store.Wanted(DataSource(uri="s3://data/sets"), "dataset")
    info = type("Info", (), {"path": "data/sets/../../x.jsonl", "size": 1, "mtime_ns": 1})
    with pytest.raises(TrainerFailure, match=r"cannot be a file's name"):
        object_store._item(info, wanted)


@BOTH
def test_a_job_is_prepared_and_no_credential_is_left(stores: Stores, tmp_path: Path, scheme: str) -> None:
    """Over TLS, as at a cloud, by a CA of our own."""
    secret = stores.tls_secret(scheme)
    model = ModelConfig(source=Source(uri=f"{scheme}://data/tiny", secret_path=secret))
    rows = DataSource(uri=f"{scheme}://data/sets/shards", secret_path=secret)
    config = job(tmp_path, [rows], stage="SFT", model=model)
    env = {**os.environ, names.ENV_CONFIG: str(write_config(config, tmp_path / "config"))}
    refused = run_module("posttrain_trainer.prepare", env)
    assert "certificate" in refused.stderr
    assert not (tmp_path / "run" / names.PREPARED_DIR / "manifest.json").exists()
    env["SSL_CERT_FILE"] = stores.facts["ca"]
    done = run_module("posttrain_trainer.prepare", env)
    assert done.returncode == 0, done.stderr
    prepared = read_manifest(tmp_path / "run" / names.PREPARED_DIR)
    assert prepared is not None
    assert prepared.data_report.rows == 31
    assert (prepared.resolved.revision or "").startswith("sha256:")
    left = (
        done.stdout
        + done.stderr
        + "".join(path.read_text(errors="replace") for path in (tmp_path / "run").rglob("*") if path.is_file())
    )
    for value in _secret_values(Path(secret)):
        assert value not in left
    before = len(stores.control(scheme, "_log"))
    (tmp_path / "run" / names.PREPARED_DIR / "manifest.json").unlink()
    assert run_module("posttrain_trainer.prepare", env).returncode == 0
    assert len(stores.control(scheme, "_log")) == before


def _secret_values(folder: Path) -> list[str]:
    if (folder / "credentials.json").exists():
        return [json.loads((folder / "credentials.json").read_text())["private_key"].splitlines()[1]]
    return [(folder / name).read_text().strip() for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]


def test_training_sees_no_credentials(tmp_path: Path) -> None:
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", buckets.GS_ENV), "x")
    config = job(tmp_path, write_jsonl(tmp_path / "a.jsonl", pairs(1)))
    seen = child_environment({**keys, "AWS_REGION": "eu-west-1"}, config, 1, cpu=True)
    assert not set(keys) & set(seen)
    assert seen["AWS_REGION"] == "eu-west-1"
