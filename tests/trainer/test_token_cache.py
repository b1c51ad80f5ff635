"""The claim's cache of token sets: used where everything is the same, never trusted without its manifest."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare_kit import job, model_folder, model_source, pairs, small_tokenizer, source, write_jsonl

from posttrain_api.trainer import JobIdentity, TrainerConfig
from posttrain_trainer import prepare_data, token_cache
from posttrain_trainer.data import build
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.prepare import prepare
from posttrain_trainer.prepared import Prepared
from posttrain_trainer.tokenset import SHAPE, set_files


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "tiny")


class Claim:
    """A claim with data, on which jobs run one after the other. `made`: how often rows were tokenised."""

    def __init__(self, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self.made = folder, model, 0
        self.rows = write_jsonl(folder / "data" / "train.jsonl", [*pairs(20), "{"])
        self.cache = folder / "claim" / token_cache.FOLDER / "tokens"
        monkeypatch.setattr(prepare_data.build, "build", self._build)

    def _build(self, *arguments: Any) -> build.Built:
        self.made += 1
        return _BUILD(*arguments)

    def config(self, uid: str, **fields: Any) -> TrainerConfig:
        data = {"bad_rows_policy": "Skip", "bad_rows_max_fraction": 0.1, **fields.pop("data", {})}
        train = [source(self.rows, **fields.pop("source", {}))]
        made = job(self.folder, train, data=data, **{"stage": "SFT", "model": model_source(self.model), **fields})
        identity = JobIdentity(namespace="test", name="job", uid=uid)
        run_dir = str(self.folder / "claim" / "job" / uid)
        return made.model_copy(update={"job": identity, "run_dir": run_dir})

    def run(self, uid: str, **fields: Any) -> Prepared:
        return prepare(self.config(uid, **fields))

    def entries(self) -> list[Path]:
        return sorted(self.cache.iterdir())


_BUILD = build.build


@pytest.fixture
def claim(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Claim:
    return Claim(tmp_path, model, monkeypatch)


def contents(folder: str) -> dict[str, bytes]:
    return {name: (Path(folder) / name).read_bytes() for name in set_files(Path(folder))}


def test_a_second_job_takes_the_set_of_the_first(claim: Claim, caplog: pytest.LogCaptureFixture) -> None:
    first = claim.run("a")
    with caplog.at_level(logging.INFO, "posttrain.prepare"):
        second = claim.run("b", training={"learning_rate": 1.0, "seed": 5})
    assert claim.made == 1
    assert "tokenised by an earlier job" in caplog.text
    assert second.data_digest == first.data_digest
    assert second.data_report == first.data_report
    assert contents(second.train_dir) == contents(first.train_dir)
    assert os.path.samefile(Path(first.train_dir) / "tokens.bin", Path(second.train_dir) / "tokens.bin")
    for name in ("refused-train.jsonl", "preflight.txt"):
        texts = [(Path(each.train_dir).parent / name).read_text() for each in (first, second)]
        assert texts[0] == texts[1] != ""


def test_a_job_outlives_the_cache_and_the_first_job(claim: Claim) -> None:
    first, second = claim.run("a"), claim.run("b")
    before = contents(second.train_dir)
    shutil.rmtree(claim.cache)
    shutil.rmtree(Path(first.train_dir).parents[1])
    assert contents(second.train_dir) == before


def _other_content(claim: Claim) -> dict[str, Any]:
    """As long as before, and as old."""
    status = claim.rows.stat()
    claim.rows.write_text(claim.rows.read_text().replace("what is 1 plus", "what is 7 plus"))
    os.utime(claim.rows, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert claim.rows.stat().st_size == status.st_size
    return {}


def _other_tokenizer(claim: Claim) -> dict[str, Any]:
    chosen = small_tokenizer()
    chosen.chat_template = (chosen.chat_template or "") + "{# #}"
    return {"model": model_source(model_folder(claim.folder / "other", chosen))}


def _other_further_template(claim: Claim) -> dict[str, Any]:
    """It lies in a folder of its own, and rows without tools do not even use it."""
    chosen = small_tokenizer()
    chosen.chat_template = {"default": chosen.chat_template, "tool_use": "{{ messages }}"}
    return {"model": model_source(model_folder(claim.folder / "other", chosen))}


CHANGES: dict[str, Callable[[Claim], dict[str, Any]]] = {
    "content": _other_content,
    "template": _other_tokenizer,
    "further template": _other_further_template,
    "length": lambda _: {"data": {"max_length": 63}},
    "loss": lambda _: {"data": {"loss_on": "All"}},
    "limit of bad rows": lambda _: {"data": {"bad_rows_max_fraction": 0.2}},
    "rows": lambda _: {"source": {"max_rows": 19}},
    "columns": lambda _: {"source": {"columns": {"prompt": "completion", "completion": "prompt"}}},
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_changes_the_tokens_is_tokenised_anew(claim: Claim, change: str) -> None:
    claim.run("a")
    claim.run("b", **CHANGES[change](claim))
    assert claim.made == 2
    assert len(claim.entries()) == 2


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    _write(path, content)


def _write(path: Path, content: bytes) -> None:
    path.unlink()  # the first job has its own name of the bytes: only the cache's are spoilt
    path.write_bytes(content)


SPOILS: dict[str, Callable[[Path], None]] = {
    "a bit": lambda entry: _flip(entry / "tokens.bin"),
    "cut": lambda entry: _write(entry / "mask.bin", b"\0"),
    "a file": lambda entry: (entry / "offsets.bin").unlink(),
    "torn manifest": lambda entry: _write(entry / token_cache.MANIFEST, b'{"dig'),
    "another shape": lambda entry: _write(entry / SHAPE, b'{"arity": 1, "columns": 5}'),
}


@pytest.mark.parametrize("spoil", list(SPOILS))
def test_a_spoilt_entry_is_replaced(claim: Claim, spoil: str, caplog: pytest.LogCaptureFixture) -> None:
    first = claim.run("a")
    (entry,) = claim.entries()
    SPOILS[spoil](entry)
    assert claim.run("b").data_digest == first.data_digest
    assert claim.made == 2
    assert "cannot be trusted and is removed" in caplog.text
    assert claim.run("c").data_digest == first.data_digest
    assert claim.made == 2


def test_an_entry_without_manifest_is_not_used(claim: Claim) -> None:
    first = claim.run("a")
    (claim.entries()[0] / token_cache.MANIFEST).unlink()
    assert claim.run("b").data_digest == claim.run("c").data_digest == first.data_digest
    assert claim.made == 2


def test_two_jobs_at_once(claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one keeps its set while this one tokenises: this one's is dropped, and nothing is left of it."""
    other = claim.config("b")

    def meanwhile(*arguments: Any) -> build.Built:
        if claim.made == 0:
            claim.made += 1
            prepare(other)
        return _BUILD(*arguments)

    monkeypatch.setattr(prepare_data.build, "build", meanwhile)
    claim.run("a")
    (entry,) = claim.entries()
    assert json.loads((entry / token_cache.MANIFEST).read_text())["report"]["used"] == 20


def test_old_entries_and_torn_ones_are_swept(claim: Claim) -> None:
    """An entry without a manifest is one whose removal was cut off."""
    claim.run("a")
    (old,) = claim.entries()
    torn, half = claim.cache / "tmp-1", claim.cache / "0123"
    for folder in (torn, half):
        folder.mkdir()
        (folder / "tokens.bin").touch()
    long_ago = time.time() - 31 * 24 * 3600
    for path in (old / token_cache.MANIFEST, torn, half):
        os.utime(path, (long_ago, long_ago))
    claim.run("b", data={"max_length": 63})
    (left,) = claim.entries()
    assert left not in (old, torn, half)


def test_what_was_just_cut_off_stays(claim: Claim) -> None:
    """Another job may be writing it."""
    claim.run("a")
    fresh = [claim.cache / "tmp-1", claim.cache / "0123"]
    for folder in fresh:
        folder.mkdir()
    claim.run("b", data={"max_length": 63})
    assert set(fresh) < set(claim.entries())


def test_an_entry_of_another_user_is_used(claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be read and neither linked nor marked."""
    first = claim.run("a")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", denied)
    monkeypatch.setattr(os, "utime", denied)
    assert contents(claim.run("b").train_dir) == contents(first.train_dir)
    assert claim.made == 1


def test_a_shard_that_is_gone_is_named_by_the_reader(claim: Claim) -> None:
    """Not by the cache, whose hashing comes to it first."""
    shards = claim.rows.parent
    write_jsonl(claim.rows, pairs(build.PEEK_ROWS))
    (shards / "zzz.jsonl").symlink_to(shards / "nowhere")
    config = claim.config("a")
    data = config.data.model_copy(update={"train": (source(shards),)})
    with pytest.raises(TrainerFailure, match=r"zzz\.jsonl: .* was listed and is gone\. Put it back"):
        prepare(config.model_copy(update={"data": data}))


def test_without_links_files_are_copied(claim: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    first, second = claim.run("a"), claim.run("b")
    assert claim.made == 1
    assert contents(first.train_dir) == contents(second.train_dir)
    assert not os.path.samefile(Path(first.train_dir) / "tokens.bin", Path(second.train_dir) / "tokens.bin")


def test_a_cache_that_cannot_be_written_fails_no_job(claim: Claim, caplog: pytest.LogCaptureFixture) -> None:
    claim.cache.parent.parent.mkdir(parents=True)
    claim.cache.parent.write_text("in the way")
    with caplog.at_level(logging.INFO, "posttrain.prepare"):
        assert claim.run("a").data_report.used == 20
    assert "is not kept" in caplog.text


def test_no_cache_outside_a_claim(claim: Claim) -> None:
    config = claim.config("a")
    prepare(config.model_copy(update={"run_dir": str(claim.folder / "elsewhere")}))
    assert not claim.cache.exists()
