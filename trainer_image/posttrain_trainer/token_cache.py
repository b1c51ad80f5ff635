"""Token sets kept on the claim, so that a second job with the same data and settings need not tokenise again.

Called by `prepare`. An entry is a folder named by everything that its tokens depend on: the contents of the data's
files, the tokenizer with its chat template, lengths, columns, what the loss is on, and the versions of the code. Files
are hashed, not judged by size and time: a file that was rewritten in the same second would pass for the old one, and
hashing reads a hundred times faster than tokenising. An entry appears whole, by rename; its digest is checked each time
it is used; what cannot be trusted is made anew. Nothing here may fail a job: the cache is a help.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from posttrain_api.base import Model
from posttrain_api.records import DataReport
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.checkpoint_files import write_json
from posttrain_trainer.data.build import Built, OpenSource, Sample, Schema, digest_of
from posttrain_trainer.data.readers import Place
from posttrain_trainer.tokenset import TokenSet, set_files

FOLDER = ".posttrain-cache"
VERSION = 2
"""Of what a set means: raised with every change to row kinds, prompts, masks or the files of a set."""
MANIFEST = "manifest.json"
REFUSED = "refused.jsonl"
UNUSED_SECONDS = 30 * 24 * 3600.0
TORN_SECONDS = 24 * 3600.0
ROOM = 10
"""Where files cannot be linked they are copied, if so many times their size is free."""

_log = logging.getLogger("posttrain.prepare")


class Entry(Model):
    """The manifest of an entry. `samples`: file, unit, number and row of the set of each sample."""

    digest: str
    report: DataReport
    sources: tuple[int, ...]
    samples: tuple[tuple[str, str, int, int], ...]


def key_of(facts: Mapping[str, object]) -> str:
    """32 hex digits over what the tokens depend on, the code included."""
    code = {name: version(name) for name in ("posttrain", "tokenizers", "transformers")}
    text = json.dumps({"version": VERSION, **code, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def source_facts(opened: OpenSource, schema: Schema | None) -> dict[str, object]:
    """What the rows of a source depend on. Reads its files."""
    files = []
    for file in opened.files:
        with file.path.open("rb") as stream:
            files.append([file.name, file.format, hashlib.file_digest(stream, "sha256").hexdigest()])
    shape = None if schema is None else [schema.kind, sorted(schema.mapping.items()), schema.needed]
    return {"files": files, "rows": opened.source.max_rows, "schema": shape}


def root_of(config: TrainerConfig) -> Path | None:
    """The cache of the claim that `run_dir` is on; None where `run_dir` is no `<claim>/<name>/<uid>`."""
    run_dir = Path(config.run_dir)
    if run_dir.parts[-2:] != (config.job.name, config.job.uid):
        return None
    return run_dir.parent.parent / FOLDER / "tokens"


@dataclass(frozen=True)
class TokenCache:
    """The entries of a claim. `root` None: there is no cache, and every set is made."""

    root: Path | None

    def get(self, folder: Path, facts: Callable[[], Mapping[str, object]], make: Callable[[], Built]) -> Built:
        """The token set in `folder`, from the cache or made by `make`, which fills `folder` too."""
        if self.root is None:
            return make()
        _log.info("%s: reading the data once, to look for their token set in %s", folder.name, self.root)
        try:
            entry = self.root / key_of(facts())
        except OSError as error:  # a file that is gone or may not be read: whoever reads its rows says so in full
            _log.info("%s: its token set is not looked up: %s", folder.name, error)
            return make()
        built = self._take(entry, folder)
        if built is None:
            built = make()
            self._keep(entry, folder, built)
        return built

    def _take(self, entry: Path, folder: Path) -> Built | None:
        try:
            manifest = Entry.model_validate_json((entry / MANIFEST).read_text())
            folder.mkdir()
            for name in set_files(entry):
                _place(entry / name, folder / name)
            if digest_of(folder) != manifest.digest:
                raise ValueError("its files are not those of its manifest")
            if (entry / REFUSED).exists():
                shutil.copyfile(entry / REFUSED, _refused(folder))
            _touch(entry / MANIFEST)
        except OSError as error:
            # Mostly: there is no such entry. A full storage is no fault of the entry, a missing file of it is.
            torn = isinstance(error, FileNotFoundError) and (entry / MANIFEST).exists()
            self._miss(entry, folder, error if torn else None)
            return None
        except (ValueError, KeyError, TypeError) as error:
            self._miss(entry, folder, error)
            return None
        _log.info("%s: tokenised by an earlier job, taken from %s: %s", folder.name, entry, manifest.report.to_json())
        return _built(manifest, folder)

    def _miss(self, entry: Path, folder: Path, fault: Exception | None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        if fault is not None:
            _log.warning("%s cannot be trusted and is removed: %s", entry, fault)
            shutil.rmtree(entry, ignore_errors=True)

    def _keep(self, entry: Path, folder: Path, built: Built) -> None:
        assert self.root is not None
        temporary = self.root / f"tmp-{uuid.uuid4().hex}"
        try:
            temporary.mkdir(parents=True)
            for name in set_files(folder):
                _place(folder / name, temporary / name)
            if _refused(folder).exists():
                shutil.copyfile(_refused(folder), temporary / REFUSED)
            write_json(temporary / MANIFEST, _manifest(built).to_wire())
            if not (entry / MANIFEST).exists():
                shutil.rmtree(entry, ignore_errors=True)
            temporary.rename(entry)
            _sweep(self.root)
        except OSError as error:
            # Also where another job has just made the same entry: a folder that is not empty is not replaced.
            _log.info("the token set is not kept in %s for later jobs: %s", self.root, error)
            shutil.rmtree(temporary, ignore_errors=True)


def _refused(folder: Path) -> Path:
    return folder.parent / f"refused-{folder.name}.jsonl"


def _place(source: Path, target: Path) -> None:
    """A hard link: a second name of the same bytes. Where the file system has none, a copy, if there is room."""
    try:
        os.link(source, target)
        return
    except FileNotFoundError:
        raise
    except OSError:
        if shutil.disk_usage(target.parent).free < ROOM * source.stat().st_size:
            raise
    shutil.copyfile(source, target)


def _touch(file: Path) -> None:
    """In use. Another user's entry may be used and not marked: then it is swept when it is old, and made anew."""
    try:
        os.utime(file)
    except PermissionError as error:
        _log.info("%s: %s", file, error)


def _manifest(built: Built) -> Entry:
    samples = tuple((each.place.file, each.place.unit, each.place.number, each.number) for each in built.samples)
    return Entry(digest=built.digest, report=built.report, sources=built.sources, samples=samples)


def _built(entry: Entry, folder: Path) -> Built:
    tokens = TokenSet(folder)
    samples = (Sample(Place(file, unit, number), row, tokens[row]) for file, unit, number, row in entry.samples)
    return Built(entry.report, entry.sources, tuple(samples), entry.digest)


def _sweep(root: Path) -> None:
    """Removes entries that no job has used for long, and what was cut off before it was whole or while it was removed.
    Jobs that use an entry keep their own names of its files."""
    now = time.time()
    for folder in root.iterdir():
        manifest = folder / MANIFEST
        torn = folder.name.startswith("tmp-") or not manifest.exists()
        try:
            age = now - (folder if torn else manifest).stat().st_mtime
        except FileNotFoundError:
            continue
        if age > (TORN_SECONDS if torn else UNUSED_SECONDS):
            shutil.rmtree(folder, ignore_errors=True)
