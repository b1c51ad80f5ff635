"""Who sends a report: bearer token → TokenReview with our audience → namespace and pod.

Used by the handlers. A token says in which namespace and in which pod its sender runs; whether that pod belongs to
the job is the handlers' question. Answers are kept for at most ten seconds under the token's hash (a deleted pod's
token is accepted by the API server for about as long anyway); refusals are kept too, so that a broken client costs
one review in ten seconds. No token is ever logged or stored.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from posttrain_operator.cluster.reviews import TokenIdentity

_PREFIX = "system:serviceaccount:"
MAX_TOKEN = 16384
"""Characters; a projected token has about 1,200."""


class TokenRefused(Exception):
    """401: the token is missing, invalid, for another audience, or bound to no pod. The message says which."""


@dataclass(frozen=True)
class Sender:
    """A pod that has proved who it is."""

    namespace: str
    service_account: str
    pod_name: str
    pod_uid: str


def bearer(header: str | None) -> str:
    """The token of an Authorization header. TokenRefused where there is none."""
    scheme, _, token = (header or "").strip().partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > MAX_TOKEN:
        raise TokenRefused("Authorization: must be 'Bearer <projected service account token>'")
    return token


def sender_of(identity: TokenIdentity | None) -> Sender:
    """The pod behind a review's answer. TokenRefused where there is no valid token or no pod behind it."""
    if identity is None:
        raise TokenRefused("the token is not valid here: it must be unexpired and made for this server's audience")
    namespace, _, account = identity.username.removeprefix(_PREFIX).partition(":")
    if not identity.username.startswith(_PREFIX) or not namespace or not account:
        raise TokenRefused("the token must be a service account's")
    if not identity.pod_uid or not identity.pod_name:
        raise TokenRefused("the token is bound to no pod: use a projected volume's token")
    return Sender(namespace, account, identity.pod_name, identity.pod_uid)


class Authenticator:
    """Reviews tokens through `review` (token → identity or None), with a small memory of recent answers."""

    def __init__(
        self,
        review: Callable[[str], Awaitable[TokenIdentity | None]],
        ttl: float = 10.0,
        size: int = 8192,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._review = review
        self._ttl = min(ttl, 10.0)
        self._size = size
        self._clock = clock
        self._answers: OrderedDict[bytes, tuple[float, TokenIdentity | None]] = OrderedDict()

    async def sender(self, header: str | None) -> Sender:
        """The sender of a request by its Authorization header. TokenRefused, or what the API call raises."""
        token = bearer(header)
        key = hashlib.sha256(token.encode()).digest()
        known = self._answers.get(key)
        if known is not None and self._clock() - known[0] < self._ttl:
            return sender_of(known[1])
        asked = self._clock()
        identity = await self._review(token)
        self._remember(key, asked, identity)
        return sender_of(identity)

    def _remember(self, key: bytes, asked: float, identity: TokenIdentity | None) -> None:
        self._answers[key] = (asked, identity)
        self._answers.move_to_end(key)
        while len(self._answers) > self._size:
            self._answers.popitem(last=False)
