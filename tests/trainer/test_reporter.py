"""The reporter against a real HTTPS server that answers as told. Short intervals, real time."""

import http.server
import json
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from posttrain_api import names
from posttrain_api.records import Checkpoint, DataReport, Report
from posttrain_trainer.reporter import Reporter, ReporterTiming
from posttrain_trainer.signs import finite_metrics

FAST = ReporterTiming(interval=0.2, urgent=0.01, heartbeat=0.6, request=2.0, retry_first=0.05, retry_most=0.2)
CHECKPOINT = Checkpoint(step=5, time="2026-01-01T00:00:00Z", uri="pvc://a/b", size_bytes=1, digest="d")


def certificate(folder: Path) -> None:
    """A self-signed certificate for localhost: `ca.crt` to trust, `server.pem` to serve."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(hours=1))
    builder = builder.not_valid_after(now + timedelta(hours=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "server.pem").write_bytes(pem + private)
    (folder / "ca.crt").write_bytes(pem)


class Server:
    """Takes reports; `answers` are given in turn, the last one for ever: (code, headers, seconds to wait before)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.received: list[tuple[float, str, dict[str, Any]]] = []
        self.answers: list[tuple[int, dict[str, str], float]] = [(200, {}, 0.0)]
        self.connections = 0
        self.answer: dict[str, Any] = {"message": "as the test says"}
        self.stacks: list[tuple[str, str]] = []
        self.heartbeats = 0
        self.idle: float | None = None
        self._port = 0
        self._http: http.server.ThreadingHTTPServer | None = None
        certificate(folder)
        (folder / "token").write_text("first\n")

    def start(self) -> None:
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = outer.idle

            def setup(self) -> None:
                super().setup()
                outer.connections += 1

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                if "/stacks/" in self.path:
                    outer.stacks.append((self.path, body))
                elif self.path == "/heartbeat":
                    outer.heartbeats += 1
                else:
                    outer.received.append((time.monotonic(), self.headers["Authorization"], json.loads(body)))
                code, headers, pause = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                time.sleep(pause)
                answer = json.dumps(outer.answer).encode()
                self.send_response(code)
                for name, value in {**headers, "Content-Length": str(len(answer))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                """Silence."""

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._http.server_port
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "server.pem")
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    @property
    def environ(self) -> dict[str, str]:
        return {
            names.ENV_STATUS_URL: f"https://localhost:{self._port}/report",
            names.ENV_STATUS_CA: str(self.folder / "ca.crt"),
            names.ENV_STATUS_TOKEN: str(self.folder / "token"),
            "HTTPS_PROXY": "http://127.0.0.1:9",
        }

    @property
    def steps(self) -> list[int]:
        return [body.get("step", 0) for _, _, body in self.received]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def reporter(server: Server) -> Iterator[Reporter]:
    made = Reporter.from_env(server.environ, FAST)
    yield made
    made.close(1.0)


def training(step: int, **fields: Any) -> Report:
    return Report(phase="Training", step=step, total_steps=100, **fields)


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def test_without_a_url_nothing_happens() -> None:
    reporter = Reporter.from_env({})
    reporter.report(training(1))
    reporter.close()
    assert "posttrain-reporter" not in [thread.name for thread in threading.enumerate()]


def test_a_report_arrives_with_the_token_over_verified_tls(server: Server, reporter: Reporter) -> None:
    reporter.report(training(3, metrics={"loss": 1.5}))
    until(lambda: len(server.received) == 1)
    _, token, body = server.received[0]
    assert token == "Bearer first"
    assert Report.model_validate(body) == training(3, metrics={"loss": 1.5})


def test_a_stream_is_thinned_and_the_newest_wins(server: Server, reporter: Reporter) -> None:
    for step in range(1, 101):
        reporter.report(training(step))
        time.sleep(0.005)
    until(lambda: server.steps[-1:] == [100])
    times = [time for time, _, _ in server.received]
    assert 3 <= len(times) <= 8
    assert all(later - earlier > 0.15 for earlier, later in pairwise(times[1:]))


def test_phase_and_facts_go_out_at_once(server: Server) -> None:
    reporter = Reporter.from_env(server.environ, ReporterTiming(urgent=0.01))
    data = DataReport(rows=5, used=4, tokens=9)
    reports = [training(1), training(1, checkpoint=CHECKPOINT), training(1, data_report=data)]
    for number, report in enumerate([*reports, Report(phase="Saving", step=1)], start=1):
        reporter.report(report)
        until(lambda number=number: len(server.received) == number)
    reporter.close(1.0)


def test_what_was_told_once_is_told_again(server: Server, reporter: Reporter) -> None:
    reporter.report(training(1, checkpoint=CHECKPOINT))
    until(lambda: len(server.received) == 1)
    reporter.report(training(2))
    until(lambda: len(server.received) == 2)
    assert server.received[1][2]["checkpoint"] == CHECKPOINT.to_wire()


def test_silence_of_the_loop_is_filled_with_heartbeats(server: Server, reporter: Reporter) -> None:
    reporter.report(training(1, last_advance_time="2026-01-01T00:00:00Z"))
    until(lambda: len(server.received) == 3)
    assert {body["lastAdvanceTime"] for _, _, body in server.received} == {"2026-01-01T00:00:00Z"}
    assert server.received[2][0] - server.received[1][0] > 0.5


def test_the_token_is_read_again_for_every_report(server: Server, reporter: Reporter) -> None:
    reporter.report(training(1))
    until(lambda: len(server.received) == 1)
    (server.folder / "token").write_text("second")
    reporter.report(training(2))
    until(lambda: len(server.received) == 2)
    assert server.received[1][1] == "Bearer second"


def test_a_new_authority_is_taken_without_a_restart(server: Server, reporter: Reporter) -> None:
    reporter.report(training(1))
    until(lambda: len(server.received) == 1)
    server.stop()
    certificate(server.folder)
    server.start()
    reporter.report(training(2))
    until(lambda: 2 in server.steps)


def test_one_connection_serves_all_reports(server: Server, reporter: Reporter) -> None:
    for step in range(1, 4):
        reporter.report(training(step))
        until(lambda step=step: server.steps[-1:] == [step])
    assert server.connections == 1


def test_a_connection_that_the_server_closed_costs_nothing(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.stop()
    server.idle = 0.1
    server.start()
    reporter = Reporter.from_env(server.environ, FAST)
    for step in range(1, 4):
        reporter.report(training(step))
        until(lambda step=step: server.steps[-1:] == [step])
        time.sleep(0.3)
    assert server.connections >= 3
    assert caplog.records == []
    reporter.close(1.0)


def test_a_url_without_tls_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    Reporter.from_env({names.ENV_STATUS_URL: "http://host/report"}).report(training(1))
    assert "must begin with https://" in caplog.text


def test_a_slow_server_never_blocks_the_loop(server: Server, reporter: Reporter) -> None:
    server.answers = [(200, {}, 1.0)]
    reporter.report(training(1))
    until(lambda: len(server.received) == 1)
    start = time.monotonic()
    for step in range(200):
        reporter.report(training(step))
    assert time.monotonic() - start < 0.5


def test_an_outage_is_logged_once_and_so_is_its_end(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "posttrain_trainer.reporter")
    environ = server.environ
    server.stop()
    reporter = Reporter.from_env(environ, FAST)
    for step in range(1, 20):
        reporter.report(training(step))
        time.sleep(0.05)
    server.start()
    until(lambda: server.steps[-1:] == [19])
    until(lambda: len(caplog.records) == 2)
    assert "training goes on" in caplog.messages[0]
    assert "again" in caplog.messages[1]
    reporter.close(1.0)


@pytest.mark.parametrize("code", [401, 403, 404, 503])
def test_refusals_that_may_pass_are_tried_again(server: Server, reporter: Reporter, code: int) -> None:
    server.answers = [(code, {}, 0.0), (code, {}, 0.0), (200, {}, 0.0)]
    reporter.report(training(7))
    until(lambda: server.steps == [7, 7, 7])


def test_retry_after_is_obeyed(server: Server) -> None:
    reporter = Reporter.from_env(server.environ, ReporterTiming(interval=0.01, urgent=0.01, retry_first=0.01))
    server.answers = [(429, {"Retry-After": "1"}, 0.0), (200, {}, 0.0)]
    reporter.report(training(1))
    until(lambda: len(server.received) == 2)
    assert server.received[1][0] - server.received[0][0] >= 0.95
    reporter.close(1.0)


def test_a_report_that_is_wrong_is_not_repeated_but_the_next_is_sent(server: Server) -> None:
    reporter = Reporter.from_env(server.environ, ReporterTiming(interval=0.05, urgent=0.01))
    server.answers = [(422, {}, 0.0), (200, {}, 0.0)]
    reporter.report(training(1))
    until(lambda: len(server.received) == 1)
    time.sleep(0.3)
    assert server.steps == [1]
    reporter.report(training(2))
    until(lambda: server.steps == [1, 2])
    reporter.close(1.0)


def test_a_finished_job_ends_the_reporting(server: Server, reporter: Reporter) -> None:
    server.answers = [(409, {}, 0.0)]
    reporter.report(training(1))
    until(lambda: len(server.received) == 1)
    until(lambda: not reporter._thread.is_alive())
    reporter.report(training(2))
    assert server.steps == [1]


def test_close_sends_the_last_report(server: Server) -> None:
    reporter = Reporter.from_env(server.environ, ReporterTiming())
    reporter.report(training(1))
    until(lambda: len(server.received) == 1)
    reporter.report(training(2))
    reporter.close(5.0)
    assert server.steps == [1, 2]
    assert not reporter._thread.is_alive()


def test_close_without_a_server_returns_in_time(server: Server) -> None:
    reporter = Reporter.from_env(server.environ, FAST)
    server.answers = [(200, {}, 30.0)]
    reporter.report(training(1))
    until(lambda: len(server.received) == 1)
    start = time.monotonic()
    reporter.close(0.2)
    assert time.monotonic() - start < 1.0


def test_close_during_an_outage_tries_once_more_and_ends(server: Server) -> None:
    environ = server.environ
    server.stop()
    reporter = Reporter.from_env(environ, FAST)
    reporter.report(training(1))
    reporter.close(3.0)
    assert not reporter._thread.is_alive()


@pytest.mark.parametrize("missing", ["ca.crt", "token"])
def test_missing_files_disturb_nothing(server: Server, reporter: Reporter, missing: str) -> None:
    content = (server.folder / missing).read_text()
    (server.folder / missing).unlink()
    reporter.report(training(1))
    time.sleep(0.2)
    assert server.received == []
    (server.folder / missing).write_text(content)
    until(lambda: server.steps[:1] == [1])


def test_only_finite_metrics_may_be_reported() -> None:
    metrics = {"loss": float("nan"), "grad_norm": float("inf"), **{f"m{number}": number for number in range(40)}}
    kept = finite_metrics(metrics)
    assert len(kept) == 32
    assert training(1, metrics=kept).metrics["m0"] == 0.0


def test_a_metric_that_is_no_number_does_not_cost_the_report(server: Server, reporter: Reporter) -> None:
    reporter.report(training(1).model_copy(update={"metrics": {"loss": 1.0, "grad_norm": float("inf")}}))
    until(lambda: len(server.received) == 1)
    assert server.received[0][2]["metrics"] == {"loss": 1.0}


def test_how_long_ago_is_worked_out_when_it_is_said(server: Server, reporter: Reporter) -> None:
    """The report waits, is repeated as a heartbeat, or tried again: its age grows meanwhile."""
    reporter.advanced(time.monotonic() - 100)
    reporter.report(training(1))
    until(lambda: len(server.received) == 3)
    idle = [body["idleSeconds"] for _, _, body in server.received]
    assert idle[0] >= 100
    assert idle[2] - idle[0] == pytest.approx(server.received[2][0] - server.received[0][0], abs=0.3)


def test_a_pod_without_reports_sends_heartbeats_and_hears_wishes(server: Server, reporter: Reporter) -> None:
    reporter.beat()
    until(lambda: server.heartbeats == 1)
    assert not reporter.wishes.dump
    server.answer = {"dump": True, "stallSeconds": 60}
    until(lambda: reporter.wishes.dump)
    assert reporter.wishes.stall_seconds == 60
    assert server.received == []


def test_a_report_is_answered_with_wishes_too(server: Server, reporter: Reporter) -> None:
    server.answer = {"dump": True, "stallSeconds": "soon"}
    reporter.report(training(1))
    until(lambda: reporter.wishes.dump)
    assert reporter.wishes.stall_seconds is None


def test_stacks_are_sent_until_the_server_has_them(server: Server, reporter: Reporter) -> None:
    reporter.beat()
    until(lambda: server.heartbeats == 1)
    server.answers = [(503, {}, 0.0), (200, {}, 0.0)]
    reporter.stacks(3, "where\nthread")
    until(lambda: len(server.stacks) == 2)
    assert server.stacks[1] == ("/stacks/3", "where\nthread")
    until(lambda: server.heartbeats == 2)  # and once is enough
    assert len(server.stacks) == 2


def test_stacks_that_nobody_wants_any_more_end_no_reporting(server: Server, reporter: Reporter) -> None:
    reporter.beat()
    until(lambda: server.heartbeats == 1)
    server.answers = [(409, {}, 0.0), (200, {}, 0.0)]
    reporter.stacks(0, "where")
    until(lambda: server.heartbeats == 2)
    assert len(server.stacks) == 1
