"""Sources to folders: mounted ones are used where they are, others are downloaded to the job's storage.

Called by `prepare`, the only process that has a token and a network. The commit a branch or tag stands for is looked
up once and kept, so that every attempt of a job sees the same files.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub as hub
from huggingface_hub import errors as hub_errors

from posttrain_api.places import Source
from posttrain_api.reasons import Reason
from posttrain_trainer import object_store
from posttrain_trainer.checkpoint_files import replace_json
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.kinds import DENIED, NOT_FOUND, Kind, model_patterns

REVISIONS = "revisions.json"
DATA_FILES = ("*.jsonl", "*.ndjson", "*.json", "*.parquet", "*.arrow", "README.md")


@dataclass(frozen=True)
class Fetched:
    """Where a source's files are; `revision`: the commit of an hf:// source, the digest of a bucket's listing."""

    path: Path
    revision: str | None = None


@dataclass(frozen=True)
class Fetcher:
    """`folder`: of downloads, on the job's storage; `trust_remote_code` lets a model bring Python files."""

    folder: Path
    trust_remote_code: bool = False

    def fetch(self, source: Source, kind: Kind) -> Fetched:
        """The source's files. Model/DatasetNotFound, ModelAccessDenied; an unreachable hub or store is a retryable
        TrainerError.
        """
        if source.path is not None:
            return Fetched(Path(source.path))
        if not source.uri.startswith("hf://"):
            return Fetched(*object_store.fetch(object_store.Wanted(source, kind, self.trust_remote_code), self.folder))
        return self._from_hub(source, kind)

    def _from_hub(self, source: Source, kind: Kind) -> Fetched:
        repository = source.uri.removeprefix("hf://").removeprefix("datasets/").split("@")[0].strip("/")
        try:
            return self._download(_Repository(repository, kind, source, _token(source)))
        except hub_errors.GatedRepoError as error:
            raise TrainerFailure(
                DENIED[kind],
                f"{source.uri}: access is restricted. Accept its terms on the hub with the account whose token "
                "the Secret of secretRef holds.",
            ) from error
        except hub_errors.RepositoryNotFoundError as error:
            raise TrainerFailure(
                NOT_FOUND[kind],
                f"{source.uri}: the hub has no such {kind}, or it is private. Correct the name, or set secretRef to a "
                "Secret with a token that may read it.",
            ) from error
        except hub_errors.RevisionNotFoundError as error:
            raise TrainerFailure(
                NOT_FOUND[kind],
                f"{source.uri}: there is no revision {source.revision or 'main'!r}. Correct the revision.",
            ) from error
        except hub_errors.HfHubHTTPError as error:
            raise self._http_failure(source, kind, error) from error
        except (hub_errors.HTTPError, hub_errors.LocalEntryNotFoundError) as error:  # type: ignore[attr-defined]
            raise TrainerFailure(
                Reason.TRAINER_ERROR, f"{source.uri}: the hub {hub.constants.ENDPOINT} cannot be reached: {error}"
            ) from error

    def _http_failure(self, source: Source, kind: Kind, error: hub_errors.HfHubHTTPError) -> TrainerFailure:
        code = error.response.status_code
        if code in (401, 403):
            return TrainerFailure(
                DENIED[kind],
                f"{source.uri}: the hub refuses access ({code}). Check the token in the Secret of secretRef.",
            )
        return TrainerFailure(Reason.TRAINER_ERROR, f"{source.uri}: the hub answers {code}.")

    def _download(self, repository: _Repository) -> Fetched:
        revision = self._pinned(repository)
        path = hub.snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=revision,
            cache_dir=self.folder,
            token=repository.token,
            allow_patterns=self._patterns(repository, revision),
        )
        return Fetched(Path(path), revision)

    def _patterns(self, repository: _Repository, revision: str) -> list[str]:
        if repository.kind == "dataset":
            return list(DATA_FILES)
        names = hub.HfApi().list_repo_files(repository.name, revision=revision, token=repository.token)
        return model_patterns(names, self.trust_remote_code)

    def _pinned(self, repository: _Repository) -> str:
        """The commit of the revision asked for; looked up at the first attempt, then read from storage."""
        record = self.folder / REVISIONS
        known: dict[str, str] = json.loads(record.read_text()) if record.is_file() else {}
        key = f"{repository.kind}/{repository.name}@{repository.source.revision or 'main'}"
        if key not in known:
            api, name, revision = hub.HfApi(), repository.name, repository.source.revision
            info = api.repo_info(name, repo_type=repository.kind, revision=revision, token=repository.token)
            if info.sha is None:
                raise TrainerFailure(Reason.TRAINER_ERROR, f"{repository.source.uri}: the hub names no commit.")
            known[key] = info.sha
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_json(record, known)
        return known[key]


@dataclass(frozen=True)
class _Repository:
    name: str
    kind: Kind
    source: Source
    token: str | bool


def _token(source: Source) -> str | bool:
    """The token of the source's Secret; False keeps the library from looking for one elsewhere."""
    if source.secret_path is None:
        return False
    file = Path(source.secret_path) / "token"
    try:
        token = file.read_text(errors="replace").strip()
    except OSError as error:
        raise _unusable_token(source, f"has no key `token` ({file}: {error.strerror}). Add it.") from error
    # Checked here: the client's own complaint about such a header would quote the token.
    if not re.fullmatch(r"[!-~]+", token):
        raise _unusable_token(source, "has a key `token` that is not one line of ASCII without spaces. Store it anew.")
    return token


def _unusable_token(source: Source, why: str) -> TrainerFailure:
    return TrainerFailure(Reason.MODEL_ACCESS_DENIED, f"{source.uri}: the Secret of secretRef {why}")
