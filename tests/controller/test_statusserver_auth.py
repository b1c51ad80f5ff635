"""Authenticator and rate limits: what is cached, for how long, and what is refused without asking."""

import pytest

from posttrain_operator.cluster.reviews import TokenIdentity, identity_of
from posttrain_operator.slim import job_record
from posttrain_operator.statusserver.auth import Authenticator, Sender, TokenRefused, bearer
from posttrain_operator.statusserver.limits import RateLimiter
from posttrain_operator.statusserver.view import JobView, view_of

POD = TokenIdentity("system:serviceaccount:team:default", "job-master-0", "p1")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Reviews:
    def __init__(self, answer: TokenIdentity | None) -> None:
        self.answer = answer
        self.asked: list[str] = []

    async def __call__(self, token: str) -> TokenIdentity | None:
        self.asked.append(token)
        return self.answer


async def test_a_pods_token_is_reviewed_once_in_ten_seconds() -> None:
    clock, reviews = Clock(), Reviews(POD)
    auth = Authenticator(reviews, ttl=3600, clock=clock)
    for later in (0.0, 9.9, 10.0):
        clock.now = 100 + later
        assert await auth.sender("Bearer abc") == Sender("team", "default", "job-master-0", "p1")
    assert reviews.asked == ["abc", "abc"]
    await auth.sender("bearer  other")
    assert reviews.asked[-1] == "other"


async def test_a_refusal_is_remembered_as_long() -> None:
    clock, reviews = Clock(), Reviews(None)
    auth = Authenticator(reviews, clock=clock)
    for _ in range(3):
        with pytest.raises(TokenRefused, match="not valid here"):
            await auth.sender("Bearer abc")
    assert len(reviews.asked) == 1


async def test_memory_is_bounded() -> None:
    auth = Authenticator(Reviews(POD), size=10)
    for number in range(50):
        await auth.sender(f"Bearer {number}")
    assert len(auth._answers) == 10


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        (TokenIdentity("system:serviceaccount:team:default", None, None), "bound to no pod"),
        (TokenIdentity("system:node:n1", "job-master-0", "p1"), "service account"),
        (TokenIdentity("system:serviceaccount:team", "job-master-0", "p1"), "service account"),
        (TokenIdentity("system:serviceaccount::x", "job-master-0", "p1"), "service account"),
        (TokenIdentity("team:default", "job-master-0", "p1"), "service account"),
    ],
)
async def test_only_a_pods_service_account_may_report(identity: TokenIdentity, text: str) -> None:
    with pytest.raises(TokenRefused, match=text):
        await Authenticator(Reviews(identity)).sender("Bearer abc")


@pytest.mark.parametrize("header", [None, "", "abc", "Basic abc", "Bearer", "Bearer ", "Bearer " + "a" * 20000])
def test_what_is_no_bearer_token_is_refused_without_a_review(header: str | None) -> None:
    with pytest.raises(TokenRefused, match="Authorization"):
        bearer(header)


def test_a_review_for_another_audience_is_no_identity() -> None:
    status = {"authenticated": True, "audiences": ["other"], "user": {"username": "u"}}
    assert identity_of(status, "ours") is None
    assert identity_of({**status, "audiences": []}, "ours") is None
    assert identity_of({"user": {"username": "u"}, "audiences": ["ours"]}, "ours") is None
    extra = {"authentication.kubernetes.io/pod-name": ["n"], "authentication.kubernetes.io/pod-uid": ["p"]}
    good = {"authenticated": True, "audiences": ["ours"], "user": {"username": "u", "extra": extra}}
    assert identity_of(good, "ours") == TokenIdentity("u", "n", "p")


@pytest.mark.parametrize(("kind", "value", "ended"), [("Complete", "True", True), ("Failed", "False", False)])
def test_a_job_from_its_json(kind: str, value: str, ended: bool) -> None:
    conditions = [{"type": kind, "status": value}]
    metadata = {"name": "n", "namespace": "ns", "uid": "u", "resourceVersion": "7"}
    found = {"metadata": metadata, "status": {"conditions": conditions}}
    assert view_of(job_record(found)) == JobView("u", "7", ended, None)


def test_a_bucket_lets_a_burst_through_and_then_one_at_a_time() -> None:
    clock = Clock()
    limiter = RateLimiter(3, 2.0, clock)
    assert [limiter.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 2.0]
    assert limiter.take("b") == 0.0
    clock.now += 2.0
    assert [limiter.take("a"), limiter.take("a")] == [0.0, 2.0]


def test_waiting_uses_nothing_up_and_full_buckets_are_forgotten() -> None:
    clock = Clock()
    limiter = RateLimiter(2, 1.0, clock)
    assert [limiter.wait("a") for _ in range(5)] == [0.0] * 5
    limiter.take("a")
    limiter.take("a")
    assert limiter.wait("a") == 1.0
    clock.now += 10
    limiter.wait("b")
    assert limiter._buckets == {}
