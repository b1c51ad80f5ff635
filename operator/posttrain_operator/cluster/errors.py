"""What the API server answers when it does not do what was asked, as types.

Raised by `cluster.api`, handled by the worker: which error means what is decided there, in one table.
"""

from __future__ import annotations

import json
from typing import Any


class ApiError(Exception):
    """A refused request. `status` is the HTTP code (0: no answer), `reason` Kubernetes' own word for it."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status, self.reason, self.message, self.retry_after = status, reason, message, retry_after


class NotFound(ApiError):
    """404: the object, or the kind, is not there."""


class Conflict(ApiError):
    """409: the resourceVersion or uid sent is not the object's."""


class AlreadyExists(ApiError):
    """409 of a creation."""


class Forbidden(ApiError):
    """403: no right to do it, or a quota or policy refuses it."""


class Invalid(ApiError):
    """400 or 422: the object itself is refused."""


class BadBody(ApiError):
    """500 "failed to create typed patch object": our own body does not fit the schema. Trying again cannot help."""


class Unavailable(ApiError):
    """429, 502–504 or no answer at all: everybody waits."""


class ServerError(ApiError):
    """Another 5xx: it may be this object alone, so only this one waits."""


class Fenced(ApiError):
    """Not sent: this replica does not lead (any more)."""


class WebhookFailed(ApiError):
    """500 because an admission webhook did not answer: this object waits, others need not."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: Invalid,
    401: Unavailable,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    422: Invalid,
    429: Unavailable,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def is_outage(status: int) -> bool:
    """Whether an HTTP code says that the server serves nobody at present."""
    return _BY_STATUS.get(status) is Unavailable


def error_of(status: int, body: bytes, retry_after: str | None) -> ApiError:
    """The typed error of an answer with `status` >= 400."""
    details = _details(body)
    reason, message = (
        str(details.get("reason") or ""),
        str(details.get("message") or body[:200].decode(errors="replace")),
    )
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else ApiError)
    if status == 409 and reason == "AlreadyExists":
        kind = AlreadyExists
    if status == 500 and "failed to create typed patch object" in message:
        kind = BadBody
    if status >= 500 and "failed calling webhook" in message:
        kind = WebhookFailed
    return kind(status, reason, message, _seconds(retry_after))


def _details(body: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(body)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _seconds(text: str | None) -> float | None:
    return float(text) if text and text.isdigit() else None
