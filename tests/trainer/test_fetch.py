"""hf:// sources from a local server that speaks the few hub endpoints that are used. All cases in one client
process."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prepare_kit import model_folder, pairs, write_jsonl

from posttrain_api.places import Source
from posttrain_api.reasons import Reason
from posttrain_trainer import fetch

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
KNOWN = {letter * 40 for letter in "abc"}
TOKEN = "hf_right"


class Hub(BaseHTTPRequestHandler):
    """/api/{models,datasets}/<repo>…, and <repo>/resolve/<commit>/<file>. `private/…` needs the token; `gated/…`
    never opens."""

    root: Path
    requests: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path, _, _ = self.path.partition("?")
        self.requests.append(f"{self.command} {path} {self.headers.get('Authorization', '-')}")
        found = re.match(r"^/(?:api/)?(?:models/|datasets/)?([\w-]+/[\w.-]+)(?:/(.*))?$", path)
        repository, rest = (found.group(1), found.group(2) or "") if found else ("", "")
        folder = self.root / repository
        if refusal := self._refusal(repository, folder):
            self._send(refusal[0], b"{}", {"X-Error-Code": refusal[1]})
            return
        if path.startswith("/api/"):
            self._api(folder, rest)
        else:
            _, commit, name = rest.split("/", 2)
            self._file(folder / name, commit, body)

    def _refusal(self, repository: str, folder: Path) -> tuple[int, str] | None:
        if repository.startswith("gated/"):
            return 403, "GatedRepo"
        if repository.startswith("private/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, "RepoNotFound"
        return None if folder.is_dir() else (404, "RepoNotFound")

    def _api(self, folder: Path, rest: str) -> None:
        kind, _, revision = rest.partition("/")
        revision = revision.split("/")[0] or "main"
        commit = COMMITS.get(revision, revision)
        if commit not in KNOWN:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        if kind == "tree":
            entries = [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": "0"} for name in names
            ]
            self._send(200, json.dumps(entries).encode())
            return
        repository = "/".join(folder.parts[-2:])
        siblings = [{"rfilename": name} for name in names]
        info = {
            "_id": "0",
            "id": repository,
            "sha": commit,
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
        }
        self._send(200, json.dumps(info).encode())

    def _file(self, file: Path, commit: str, body: bool) -> None:
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, body)

    def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


CLIENT = """
import json, os, sys
from pathlib import Path
from posttrain_api.places import Source
from posttrain_api.trainer import DataSource
from posttrain_trainer.data.hub_files import hub_files
from posttrain_trainer.errors import classify
from posttrain_trainer.fetch import Fetcher
work = Path(sys.argv[1])
answers = {}
for name, (kind, fields) in json.loads(sys.argv[2]).items():
    source = (Source if kind == "model" else DataSource)(**fields)
    try:
        fetched = Fetcher(work / "hub").fetch(source, kind)
        files = sorted(str(p.relative_to(fetched.path)) for p in fetched.path.rglob("*") if p.is_file())
        answers[name] = {"revision": fetched.revision, "path": str(fetched.path), "files": files}
        if kind == "dataset":
            answers[name]["train"] = [f.name for f in hub_files(fetched.path, source, "train", work / "cache")]
    except Exception as error:
        answers[name] = dict(zip(("reason", "message"), classify(error)))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("hub")
    model_folder(root / "org" / "tiny")
    (root / "org" / "tiny" / "pytorch_model.bin").write_bytes(b"the same weights, in a format that is not needed")
    (root / "org" / "tiny" / "modeling.py").write_text("raise SystemExit('remote code')")
    model_folder(root / "private" / "tiny")
    write_jsonl(root / "org" / "rows" / "train.jsonl", pairs(5))
    write_jsonl(root / "org" / "rows" / "test.jsonl", pairs(2))
    Hub.root, Hub.requests = root, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def answers(hub: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("work")
    (work / "secret").mkdir()
    (work / "secret" / "token").write_text(TOKEN + "\n")
    (work / "empty").mkdir()
    (work / "broken").mkdir()
    (work / "broken" / "token").write_text(TOKEN[:5] + "\n" + TOKEN[5:])
    secret = str(work / "secret")
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "model": ("model", {"uri": "hf://org/tiny"}),
        "tag": ("model", {"uri": "hf://org/tiny", "revision": "v1"}),
        "private": ("model", {"uri": "hf://private/tiny", "secret_path": secret}),
        "no token": ("model", {"uri": "hf://private/tiny"}),
        "empty secret": ("model", {"uri": "hf://private/tiny", "secret_path": str(work / "empty")}),
        "broken token": ("model", {"uri": "hf://private/tiny", "secret_path": str(work / "broken")}),
        "gated": ("model", {"uri": "hf://gated/tiny", "secret_path": secret}),
        "none": ("model", {"uri": "hf://org/nothing"}),
        "no revision": ("model", {"uri": "hf://org/tiny", "revision": "v9"}),
        "rows": ("dataset", {"uri": "hf://org/rows"}),
        "split": ("dataset", {"uri": "hf://org/rows", "split": "test"}),
        "no split": ("dataset", {"uri": "hf://org/rows", "split": "dev"}),
        "no rows": ("dataset", {"uri": "hf://org/nothing"}),
    }
    script = work / "client.py"
    script.write_text(CLIENT)
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(work / "home"), "HF_TOKEN": "hf_of_somebody_else"}

    def run(endpoint: str, chosen: Any) -> Any:
        command = [sys.executable, str(script), str(work), json.dumps(chosen)]
        done = subprocess.run(
            command, env={**env, "HF_ENDPOINT": endpoint}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    found: dict[str, Any] = run(hub, cases)
    found["requests"] = list(Hub.requests)
    COMMITS["main"] = "c" * 40  # the branch moves on
    found |= run(hub, {"later": cases["model"]})
    found |= run("http://127.0.0.1:9", {"unreachable": ("model", {"uri": "hf://org/other"})})
    return found


def test_model_is_pinned_and_only_what_is_needed_comes(answers: dict[str, Any]) -> None:
    assert answers["model"]["revision"] == "a" * 40
    assert answers["tag"]["revision"] == "b" * 40
    assert set(answers["model"]["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not {"pytorch_model.bin", "modeling.py"} & set(answers["model"]["files"])
    assert answers["later"] == answers["model"], "a later attempt sees the same commit"


def test_the_commit_is_on_the_disk_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record cut by a loss of power would end every later attempt."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    api = SimpleNamespace(repo_info=lambda *_, **__: SimpleNamespace(sha="b" * 40))
    monkeypatch.setattr(fetch.hub, "HfApi", lambda: api)
    monkeypatch.setattr(os, "fsync", full)
    record = tmp_path / fetch.REVISIONS
    record.write_text('{"model/org/m@v1": "' + "a" * 40 + '"}')
    before = record.read_text()
    with pytest.raises(OSError, match="No space left"):
        fetch.Fetcher(tmp_path).fetch(Source(uri="hf://org/other"), "model")
    assert record.read_text() == before


def test_token_of_the_secret_and_no_other(answers: dict[str, Any]) -> None:
    assert answers["private"]["revision"] == "a" * 40
    assert not any("somebody" in request for request in answers["requests"])
    assert not any(
        TOKEN in request and "private/" not in request and "gated/" not in request for request in answers["requests"]
    )


@pytest.mark.parametrize(
    ("case", "reason", "part"),
    [
        ("no token", Reason.MODEL_NOT_FOUND, "set secretRef"),
        ("empty secret", Reason.MODEL_ACCESS_DENIED, "no key `token`"),
        ("broken token", Reason.MODEL_ACCESS_DENIED, "not one line of ASCII"),
        ("gated", Reason.MODEL_ACCESS_DENIED, "Accept its terms"),
        ("none", Reason.MODEL_NOT_FOUND, "hf://org/nothing: the hub has no such model"),
        ("no revision", Reason.MODEL_NOT_FOUND, "no revision 'v9'"),
        ("no rows", Reason.DATASET_NOT_FOUND, "no such dataset"),
        ("no split", Reason.DATASET_SCHEMA_INVALID, "no split dev; it has:"),
        ("unreachable", Reason.TRAINER_ERROR, "cannot be reached"),
    ],
)
def test_refusals(answers: dict[str, Any], case: str, reason: Reason, part: str) -> None:
    assert answers[case].get("reason") == reason, answers[case]
    assert part in answers[case]["message"]
    assert TOKEN[5:] not in answers[case]["message"]


def test_splits(answers: dict[str, Any]) -> None:
    assert answers["rows"]["train"] == ["train.jsonl"]
    assert answers["split"]["train"] == ["test.jsonl"]
