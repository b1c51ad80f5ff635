"""A server as reward: real requests to a real server, good and bad."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from reward_kit import completion, reward, scored, three

from posttrain_api.reasons import Reason
from posttrain_trainer.errors import TrainerFailure

Answer = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))  # type: ignore[attr-defined]
        ANSWERS[self.path.split("?")[0]](self, body)

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers), None))  # type: ignore[attr-defined]
        self.say({"rewards": [1, 1, 1]})

    def say(self, value: Any, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def tries(self) -> int:
        return len(self.server.seen)  # type: ignore[attr-defined]

    def log_message(self, *args: Any) -> None:
        pass


def good(handler: Handler, body: dict[str, Any]) -> None:
    handler.say(
        {"rewards": [float(a in c) for a, c in zip(body["columns"]["answer"], body["completions"], strict=True)]}
    )


def odd_one(handler: Handler, body: dict[str, Any]) -> None:
    handler.say({"rewards": ["?" if text == "200" else 1 for text in body["completions"]]})


def busy_twice(handler: Handler, body: dict[str, Any]) -> None:
    if handler.tries() == 1:
        handler.say({}, 429, Retry_After="0")
    elif handler.tries() == 2:
        handler.say({}, 503)
    else:
        good(handler, body)


def drips(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)
    except OSError:
        pass


def says(value: Any, status: int = 200, **headers: str) -> Answer:
    return lambda handler, body: handler.say(value, status, **headers)


ANSWERS: dict[str, Answer] = {
    "/good": good,
    "/busy-twice": busy_twice,
    "/odd-one": odd_one,
    "/busy": says({}, 503),
    "/later": says({}, 429, Retry_After="100"),
    "/later-date": says({}, 429, Retry_After="Wed, 21 Oct 2150 07:28:00 GMT"),
    "/drips": drips,
    "/silent": lambda handler, body: time.sleep(5),
    "/closes": lambda handler, body: handler.connection.shutdown(socket.SHUT_RDWR),
    "/no-json": says(b"<html>oops"),
    "/list": says([1, 2, 3]),
    "/short": says({"rewards": [1]}),
    "/text": says({"rewards": "1 2 3"}),
    "/odd": says({"rewards": [1, "2", None]}),
    "/nan": says(b'{"rewards": [1, NaN, null]}'),
    "/null": says({"rewards": [1, None, 0.5]}),
    "/denied": says({"detail": "who are you"}, 401),
    "/moved": lambda handler, body: handler.say({}, 302, Location=f"http://{handler.headers['Host']}/steal?token=x"),
    "/huge": says(b" " * ((1 << 24) + 1)),
}
WAITS = ("/busy", "/silent", "/closes", "/drips")
"""Only the deadline ends them."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def of_server(server: Any, path: str, secret: Path | None = None, **settings: Any) -> Any:
    url = f"http://127.0.0.1:{server.server_port}{path}"
    http = {"url": url, "secret_path": None if secret is None else str(secret)}
    return reward(**{"name": "judge", "timeout_seconds": 10.0, "http": http, **settings})


def test_what_is_sent(server: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    result = scored(of_server(server, "/good?v=1", tmp_path), three(level=2, tags=["a"]))
    assert result.values[:, 0].tolist() == [0, 1, 0]
    ((path, headers, body),) = server.seen
    assert path == "/good?v=1"
    assert headers["Authorization"] == "Bearer s3cret"
    assert headers["Content-Type"] == "application/json"
    assert body == {
        "prompts": ["What?"] * 3,
        "completions": ["#### 1", "#### 2", "#### 3"],
        "columns": {"answer": ["2"] * 3, "level": [2] * 3, "tags": [["a"]] * 3},
    }


def test_no_token_without_a_secret(server: Any) -> None:
    scored(of_server(server, "/good"), three())
    assert "Authorization" not in server.seen[0][1]


def test_many_completions_go_in_parts(server: Any) -> None:
    many = [completion(str(n), number=n, answer=str(n) if n % 3 == 0 else "x") for n in range(300)]
    values = scored(of_server(server, "/good"), many).values[:, 0].tolist()
    assert values == [float(n % 3 == 0) for n in range(300)]
    assert [len(body["completions"]) for *_, body in server.seen] == [128, 128, 44]


def test_a_bad_value_in_a_later_part(server: Any) -> None:
    many = [completion(str(n), number=1000 + n) for n in range(300)]
    with pytest.raises(TrainerFailure, match=r"\(completion 200 of 300, row 1200\)"):
        scored(of_server(server, "/odd-one"), many)


def test_a_busy_server_is_asked_again(server: Any) -> None:
    result = scored(of_server(server, "/busy-twice"), three())
    assert result.values[:, 0].tolist() == [0, 1, 0]
    assert len(server.seen) == 3


def test_null_is_none(server: Any) -> None:
    values = scored(of_server(server, "/null"), three()).values[:, 0].tolist()
    assert values == pytest.approx([1, math.nan, 0.5], nan_ok=True)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/busy", ["it answered 503", "aise timeoutSeconds"]),
        ("/later", ["it answered 429", "(1 tries; it asks to wait 100 s)"]),
        ("/later-date", ["it answered 429", "it asks to wait"]),
        ("/silent", ["no answer in 1 s", "timeoutSeconds"]),
        ("/closes", ["no answer:", "aise timeoutSeconds"]),
        ("/drips", ["no answer in 1 s", "timeoutSeconds"]),
        ("/no-json", ["its answer is no JSON: '<html>oops'", '{"rewards": [...]}']),
        ("/list", ['its answer has no "rewards"', "[1, 2, 3]"]),
        ("/short", ["1 values for 3 completions"]),
        ("/text", ["a str ('1 2 3')"]),
        ("/odd", ["a str ('2')", "completion 1 of 3, row 12"]),
        ("/nan", ["answered nan", "completion 1 of 3, row 12"]),
        ("/denied", ["it answered 401 Unauthorized", "who are you"]),
        ("/moved", ["it answered 302", "/steal, which is not followed"]),
        ("/huge", ["longer than 16 MiB"]),
    ],
)
def test_bad_answers(server: Any, tmp_path: Path, path: str, words: list[str]) -> None:
    (tmp_path / "token").write_text("s3cret")
    seconds = 1.5 if path in WAITS else 20.0
    begun = time.monotonic()
    with pytest.raises(TrainerFailure) as caught:
        scored(of_server(server, f"{path}?key=s3cret", tmp_path, timeout_seconds=seconds), three())
    assert time.monotonic() - begun < 15
    assert caught.value.reason is Reason.REWARD_ERROR
    message = caught.value.message
    assert [word for word in ["reward 'judge': ", path, *words] if word not in message] == []
    assert {seen.partition("?")[0] for seen, *_ in server.seen} == {path}
    assert "s3cret" not in message
    assert "steal?" not in message


@pytest.mark.parametrize(("on_error", "value"), [("Zero", 0.0), ("Skip", math.nan)])
def test_a_server_that_is_down(on_error: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/score"
        settings = {"name": "judge", "timeout_seconds": 1.0, "http": {"url": url}}
        result = scored(reward(**settings, on_error=on_error), three())
        assert result.values[:, 0].tolist() == pytest.approx([value] * 3, nan_ok=True)
        assert result.failures == {"judge": 3}
        with pytest.raises(TrainerFailure, match=r"no answer: .*Connection refused.*aise timeoutSeconds"):
            scored(reward(**settings), three())


def test_a_token_that_is_not_there(server: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainerFailure, match="the secret's key 'token' cannot be read"):
        scored(of_server(server, "/good", tmp_path), three())
    assert server.seen == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "http://", "judge.svc/score"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(TrainerFailure, match=r"Correct http\.url"):
        scored(reward(name="judge", on_error="Zero", http={"url": url}), three())
