"""A reward that is a server: POST {"prompts", "completions", "columns"} as JSON, answered by {"rewards": [...]}.

Called in the reward's own process (child.py), so a server that drips or hangs costs the deadline and no more. A busy
server (429, 5xx, no connection) is asked again within the deadline, with growing pauses of random length, so that the
ranks do not come back all at once. A redirect is refused: the token would go where nobody sent it. The token is read
anew for each call, because secrets are renewed, and is never part of a message.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import random
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from posttrain_trainer.rewards.calls import Batch, Reply
from posttrain_trainer.rewards.rules import Score, Unloadable
from posttrain_trainer.rewards.values import checked

ROWS = 128
"""Completions of one request."""
TOKEN = "token"
_MOST_BYTES = 1 << 24
"""Of an answer."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
_AGAIN = frozenset({429, 500, 502, 503, 504})


class _Refused(Exception):
    """The text says what the server answered and what to do."""


class _Busy(Exception):
    """Worth asking again, after `wait` seconds where the server says so."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def post(url: str, secret_path: str | None) -> Score:
    """Asks the server at `url`; `secret_path`: a folder with the file `token`."""
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise Unloadable(f"the address {address(url)} is not http:// or https:// with a host. Correct http.url")
    opener, shown = urllib.request.build_opener(_NoRedirect), address(url)

    def score(batch: Batch, seconds: float) -> Reply:
        ends = time.monotonic() + 0.95 * seconds  # a little before the process is killed without a word
        values: list[float | None] = []
        errors: dict[int, str] = {}
        try:
            for first in range(0, len(batch), ROWS):
                part = _part(batch, first)
                reply = checked(_asked(opener, _request(url, secret_path, part), ends), part, f"{shown} answered")
                if reply.failure is not None:
                    return reply
                errors |= {first + place: text for place, text in reply.errors.items()}
                values += reply.values
        except _Refused as error:
            return Reply(failure=f"{shown}: {error}")
        return Reply(values, errors)

    return score


def address(url: str) -> str:
    """For messages: without what may be secret in it (user, password, query)."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _part(batch: Batch, first: int) -> Batch:
    def cut(values: Sequence[Any]) -> Sequence[Any]:
        return values[first : first + ROWS]

    columns = {name: cut(values) for name, values in batch.columns.items()}
    return Batch(cut(batch.prompts), cut(batch.completions), cut(batch.completion_ids), columns, cut(batch.rows))


def _request(url: str, secret_path: str | None, batch: Batch) -> urllib.request.Request:
    columns = {name: list(values) for name, values in batch.columns.items()}
    body = {"prompts": list(batch.prompts), "completions": list(batch.completions), "columns": columns}
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "posttrain"}
    if secret_path is not None:
        try:
            token = (Path(secret_path) / TOKEN).read_text().strip()
        except OSError as error:
            raise _Refused(f"the secret's key {TOKEN!r} cannot be read ({error.strerror}). Add it") from error
        headers["Authorization"] = f"Bearer {token}"
    return urllib.request.Request(url, json.dumps(body, default=str).encode(), headers, method="POST")


def _asked(opener: urllib.request.OpenerDirector, request: urllib.request.Request, ends: float) -> Any:
    """The server's rewards, asked for again and again until `ends`."""
    pause, before = _FIRST_PAUSE, ""
    for tries in range(1, 1000):
        try:
            return _rewards(_sent(opener, request, ends))
        except _Busy as busy:
            wait = busy.wait if busy.wait is not None else pause * random.uniform(0.5, 1.5)
            if time.monotonic() + wait >= ends:
                asked = f"; it asks to wait {busy.wait:.0f} s" if busy.wait is not None else ""
                raise _Refused(f"{busy} ({tries} tries{asked}). Look at the server, or raise timeoutSeconds") from busy
            time.sleep(wait)
            pause, before = min(2 * pause, _LONGEST_PAUSE), f"; before that {busy}"
        except _Refused as refused:
            raise _Refused(f"{refused}{before}") from refused
    raise _Refused("it was busy 1000 times")


def _sent(opener: urllib.request.OpenerDirector, request: urllib.request.Request, ends: float) -> bytes:
    left = ends - time.monotonic()
    if left <= 0:
        raise _Refused("there was no time left for another request. Raise timeoutSeconds, or make the server faster")
    try:
        with opener.open(request, timeout=left) as response:
            return _body(response, ends)
    except urllib.error.HTTPError as error:
        with error:
            raise _status(error) from error
    except TimeoutError as error:
        raise _Refused(f"no answer in {left:.0f} s. Raise timeoutSeconds, or make the server faster") from error
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            raise _Refused(f"no connection in {left:.0f} s. Look at the server and at network policies") from error
        if isinstance(reason, ssl.SSLError):
            raise _Refused(f"no TLS: {reason}. Give it a certificate that this image trusts") from error
        raise _Busy(f"no answer: {reason!r}") from error


def _body(response: Any, ends: float) -> bytes:
    """Piece by piece: the socket's own time limit begins anew with every byte."""
    data = bytearray()
    expected = response.length or 0  # None: it does not say
    while max(expected, len(data)) <= _MOST_BYTES:
        piece = response.read1(1 << 16)
        if not piece:
            return bytes(data)
        data += piece
        if time.monotonic() > ends:
            raise TimeoutError
    raise _Refused(f"its answer is longer than {_MOST_BYTES >> 20} MiB. Let it answer with the rewards only")


def _status(error: urllib.error.HTTPError) -> Exception:
    if error.code in _AGAIN:
        return _Busy(f"it answered {error.code} {error.reason}", _seconds(error.headers.get("Retry-After")))
    if 300 <= error.code < 400:
        where = address(error.headers.get("Location") or "")
        return _Refused(
            f"it answered {error.code} with the address {where}, which is not followed. Write it as http.url"
        )
    return _Refused(f"it answered {error.code} {error.reason}: {_excerpt(error.read(400))}")


def _seconds(retry_after: str | None) -> float | None:
    """Of a Retry-After header: seconds or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
        except ValueError:
            return None


def _rewards(data: bytes) -> Any:
    try:
        answer = json.loads(data)
    except ValueError as error:
        raise _Refused(f'its answer is no JSON: {_excerpt(data)}. Let it answer {{"rewards": [...]}}') from error
    if not isinstance(answer, dict) or "rewards" not in answer:
        raise _Refused(f'its answer has no "rewards": {_excerpt(data)}. Let it answer {{"rewards": [...]}}')
    return answer["rewards"]


def _excerpt(data: bytes) -> str:
    return repr(data[:200].decode(errors="replace"))
