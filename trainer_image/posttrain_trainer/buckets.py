"""Buckets of s3:// and gs:// sources: who asks, at which endpoint, and what the answer means.

Called by object_store.py, in `prepare`'s process alone. Credentials are read from the files of the source's Secret
and given to pyarrow's file systems; they are never put into the environment, a message or a log. (Google's client takes
the *path* of a key file from the environment: it stands there while the client is made.) What those libraries raise is
told apart by its text, because they raise one type for nearly everything.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from posttrain_api.places import Source
from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.kinds import DENIED, NOT_FOUND, Kind

S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
S3_OPTIONAL = ("AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL")
GS_KEY = "credentials.json"
GS_ENV = "GOOGLE_APPLICATION_CREDENTIALS"
DEFAULT_REGION = "us-east-1"
ATTEMPTS = 5
"""Of one request to S3; the client waits longer each time."""
RETRY_SECONDS = 60
"""How long one request to Google is tried again."""
CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
_PROBE_SECONDS = 3.0

_SECRET, _IDENTITY, _NOBODY = "with the Secret of secretRef", "with the pod's own identity", "without credentials"
_MISSING = ("NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "HTTP status code: 404", "HTTP status 404")
_REFUSED = (
    *("ACCESS_DENIED", "SIGNATURE_DOES_NOT_MATCH", "INVALID_ACCESS_KEY_ID", "INVALID_CLIENT_TOKEN_ID", "EXPIRED_TOKEN"),
    *("ExpiredToken", "InvalidToken", "UNRECOGNIZED_CLIENT", "HTTP status 401", "HTTP status 403"),
)
_NO_TOKEN = "Could not create a OAuth2 access token"
_ELSEWHERE = ("HTTP status 301", "PERMANENT_REDIRECT", "AuthorizationHeaderMalformed", "bucket is located in")


_Client = Callable[[Mapping[str, str], str], tuple[Any, str]]


class Denied(TrainerFailure):
    """The store knows who asks, or that nobody does, and refuses."""


class Missing(TrainerFailure):
    """There is no such bucket or key."""


@dataclass(frozen=True)
class Bucket:
    """A source's store as one asker sees it. `files` opens "bucket/key"; `way` and `endpoint` are for messages."""

    uri: str
    kind: Kind
    way: str
    endpoint: str
    files: Any

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Turns what the client raises inside into Missing, Denied, or a TrainerError that may be tried again."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> TrainerFailure:
        text = _short(error)
        # A token service that does not answer may answer later; a key file that is no key file never gets better.
        unusable = _NO_TOKEN in str(error) and "UNAVAILABLE" not in str(error)
        if isinstance(error, PermissionError) or unusable or _says(error, _REFUSED):
            return Denied(DENIED[self.kind], f"{self.way}: {text}")
        if isinstance(error, FileNotFoundError) or _says(error, _MISSING):
            return Missing(NOT_FOUND[self.kind], f"{self.uri}: not found at {self.endpoint}: {text}")
        if _says(error, _ELSEWHERE):
            return TrainerFailure(
                NOT_FOUND[self.kind],
                f"{self.uri}: the bucket is in another region: {text}. Set AWS_REGION in the Secret or in spec.env.",
            )
        return TrainerFailure(Reason.TRAINER_ERROR, f"{self.uri}: {self.endpoint} cannot be read {self.way}: {text}")


def buckets(source: Source, kind: Kind) -> Iterator[Bucket]:
    """The source's store, once for each way to ask, in the order they are tried: the Secret alone where there is one;
    else the pod's own identity where it may have one, then nobody (public buckets). Denied on a Secret without keys.
    """
    settings: Mapping[str, str] = os.environ
    ways: tuple[str, ...] = (_IDENTITY, _NOBODY)
    if source.secret_path is not None:
        ways, settings = (_SECRET,), {**os.environ, **_read_secret(source, kind)}
    make = _s3 if source.uri.startswith("s3://") else _gs
    for way in ways:
        if way != _IDENTITY or make is _s3 or _google_identity(settings):
            yield _open(source.uri, kind, way, make, settings)


def _open(uri: str, kind: Kind, way: str, make: _Client, settings: Mapping[str, str]) -> Bucket:
    try:
        files, endpoint = make(settings, way)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise Denied(DENIED[kind], f"{uri}: no client can be made {way}: {_short(error)}. Correct the keys.") from error
    return Bucket(uri, kind, way, endpoint, files)


def _read_secret(source: Source, kind: Kind) -> dict[str, str]:
    """The keys of the Secret that are known here. A key file stays where it is: its path is the value."""
    assert source.secret_path is not None
    folder = Path(source.secret_path)
    needed = S3_KEYS if source.uri.startswith("s3://") else (GS_KEY,)
    for name in needed:
        if not (folder / name).is_file():
            raise Denied(DENIED[kind], f"{source.uri}: the Secret of secretRef has no key `{name}` ({folder}). Add it.")
    if needed == (GS_KEY,):
        return {GS_ENV: str(folder / GS_KEY), **_present(folder, ("GCS_ENDPOINT_URL",))}
    # A session token of the pod's own environment belongs to other keys.
    return {"AWS_SESSION_TOKEN": ""} | _present(folder, (*S3_KEYS, *S3_OPTIONAL))


def _present(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    return {name: (folder / name).read_text().strip() for name in names if (folder / name).is_file()}


def _s3(settings: Mapping[str, str], way: str) -> tuple[Any, str]:
    endpoint = settings.get("AWS_ENDPOINT_URL", "").rstrip("/") or None
    credentials: dict[str, Any] = {}
    if way == _SECRET:
        key, secret = (settings[name] for name in S3_KEYS)
        token = settings["AWS_SESSION_TOKEN"] or None
        credentials = {"access_key": key, "secret_key": secret, "session_token": token}
    files = pafs.S3FileSystem(
        **credentials,
        anonymous=way == _NOBODY,
        region=settings.get("AWS_REGION") or settings.get("AWS_DEFAULT_REGION") or DEFAULT_REGION,
        endpoint_override=endpoint,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=READ_SECONDS,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )
    return files, endpoint or "AWS"


def _gs(settings: Mapping[str, str], way: str) -> tuple[Any, str]:
    endpoint = settings.get("GCS_ENDPOINT_URL", "").rstrip("/") or None
    scheme, host = "https", endpoint
    if endpoint and "://" in endpoint:
        scheme, _, host = endpoint.partition("://")
    with _key_file(settings.get(GS_ENV) if way == _SECRET else None):
        files = pafs.GcsFileSystem(
            anonymous=way == _NOBODY,
            scheme=scheme,
            endpoint_override=host,
            retry_time_limit=dt.timedelta(seconds=RETRY_SECONDS),
        )
    return files, endpoint or "Google Cloud Storage"


@contextlib.contextmanager
def _key_file(path: str | None) -> Iterator[None]:
    before = os.environ.get(GS_ENV)
    if path is not None:
        os.environ[GS_ENV] = path
    try:
        yield
    finally:
        os.environ.pop(GS_ENV, None)
        if before is not None:
            os.environ[GS_ENV] = before


def _google_identity(settings: Mapping[str, str]) -> bool:
    """Whether there may be one: a key file is named, or the metadata server is there. Asked first, because the client
    itself waits for a server that is not there until its time for retries is over."""
    if settings.get(GS_ENV) or (Path.home() / ".config/gcloud/application_default_credentials.json").is_file():
        return True
    host, _, port = settings.get("GCE_METADATA_ROOT", "metadata.google.internal").partition(":")
    try:
        socket.create_connection((host, int(port or 80)), timeout=_PROBE_SECONDS).close()
    except OSError:
        return False
    return True


def _says(error: Exception, words: tuple[str, ...]) -> bool:
    return any(word in str(error) for word in words)


def _short(error: Exception) -> str:
    """The error in one line, without the client's notes to its own developers."""
    text = str(error).split(" error_info=")[0].split(" (Request ID")[0]
    return " ".join(text.split())[:400].rstrip(" .")
