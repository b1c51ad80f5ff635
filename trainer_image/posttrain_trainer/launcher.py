"""Process 1 of a trainer pod: config → prepare (or wait for it) → torchrun → the pod's last word.

Also started by a local run, once per node. It imports no torch: it lives as long as the pod, beside the ranks. Its
exit code and termination
message are what the operator decides by, so every way out of here goes through one `Verdict`.
"""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain_api import names
from posttrain_api.reasons import Reason
from posttrain_api.records import Failure, Report, render_termination
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import attempt, waiting
from posttrain_trainer.environment import Node, load_config, node_of, uses_cpu
from posttrain_trainer.errors import classify
from posttrain_trainer.pulse import Pulse
from posttrain_trainer.ranks import child_environment, run_ranks
from posttrain_trainer.record import ENV_ATTEMPT, PREPARE, clear_ends, read_ends, utc_now
from posttrain_trainer.reporter import Reporter
from posttrain_trainer.signs import ENV_SIGNS
from posttrain_trainer.supervise import Supervisor
from posttrain_trainer.verdict import Seen, Verdict, judge
from posttrain_trainer.vigil import clear, signs_folder

log = logging.getLogger("posttrain.launcher")


@dataclass(frozen=True)
class Launcher:
    """One node's part of one attempt."""

    config: TrainerConfig
    node: Node
    cpu: bool
    environment: Mapping[str, str]
    supervisor: Supervisor
    reporter: Reporter

    def run(self) -> Verdict:
        """From preparation to the end of training."""
        number = self._begin()
        if self.node.first:
            not_prepared = self._prepare(number)
        else:
            self.reporter.beat()
            waiting.wait_for_manifest(self.config, self.supervisor, self.environment)
            not_prepared = None
        if not_prepared is not None:
            return not_prepared
        if self.supervisor.stopping:
            return _stopped("before training began")
        return judge(run_ranks(self.config, self.node, self._environment(number), self.supervisor, self.reporter))

    def _environment(self, number: int) -> dict[str, str]:
        return child_environment(self.environment, self.config, number, self.cpu)

    def _begin(self) -> int:
        """Node 0 counts the attempt and makes its pause; the others have no number (only rank 0 writes checkpoints)."""
        if not self.node.first:
            return 0
        now = attempt.begin(Path(self.config.run_dir))
        pause = attempt.backoff_seconds(now.fruitless, random.random(), self.environment)
        log.info(
            "attempt %d, newest checkpoint: %s",
            now.attempt,
            now.checkpoint_step if now.checkpoint_step >= 0 else "none",
        )
        if pause > 0:
            log.info("%d attempts in a row made no new checkpoint: waiting %.1f s", now.fruitless, pause)
            self.supervisor.sleep(pause)
        return now.attempt

    def _prepare(self, number: int) -> Verdict | None:
        """None when the manifest is there. A failure is announced to the other nodes."""
        folder = Path(self.config.run_dir) / names.PREPARED_DIR
        digest = self.config.digest()
        waiting.withdraw(folder)
        if self.supervisor.stopping or waiting.matching_manifest(self.config, digest) is not None:
            return None
        verdict = self._run_prepare(folder, number)
        if verdict is not None and verdict.reason is not None:
            failure = waiting.PrepareFailure(
                reason=verdict.reason, message=verdict.message, config_digest=digest, time=utc_now()
            )
            waiting.announce(folder, failure)
        return verdict

    def _run_prepare(self, folder: Path, number: int) -> Verdict | None:
        clear_ends(self.config.work_dir, [PREPARE])
        self.reporter.report(Report(phase="Preparing"))
        marks = signs_folder(self.config)
        environment = {**self.environment, ENV_ATTEMPT: str(number), ENV_SIGNS: str(marks)}
        environment.setdefault("HF_HOME", str(Path(self.config.work_dir) / "huggingface"))
        clear(marks)
        pulse = Pulse(marks)

        def tick() -> bool:
            waiting.beat(folder)
            self.reporter.advanced(pulse.look())
            return True

        tick()
        command = [sys.executable, "-m", "posttrain_trainer.prepare"]
        code = self.supervisor.run(command, environment, tick)
        return None if code == 0 else self._prepare_verdict(code)

    def _prepare_verdict(self, code: int) -> Verdict:
        ends = read_ends(self.config.work_dir, [PREPARE])
        seen = Seen([PREPARE], code, ends, {PREPARE: code}, utc_now(), self.supervisor.stopping)
        verdict = judge(seen)
        return Verdict(verdict.reason, verdict.message, signal=verdict.signal, time=verdict.time)


def main() -> int:
    """Runs the launcher of this pod; returns its exit code. Whatever happens, the termination message is written."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    supervisor = Supervisor()
    supervisor.install()
    reporter = Reporter.from_env(os.environ)
    try:
        verdict = _launch(supervisor, reporter)
    except Exception as error:
        reason, message = classify(error)
        log.debug("the launcher failed", exc_info=True)
        stopped = supervisor.stopping and reason is Reason.TRAINER_ERROR
        verdict = _stopped(message) if stopped else Verdict(reason, message, time=utc_now())
    _last_word(verdict, supervisor, os.environ)
    reporter.close()  # after the last word: what is left of the grace period may not be enough for both
    return verdict.exit_code


def _launch(supervisor: Supervisor, reporter: Reporter) -> Verdict:
    config = load_config(os.environ)
    node = node_of(os.environ, config)
    cpu = uses_cpu(os.environ, config.topology.gpus_per_node)
    log.info(
        "job %s/%s, node %d of %d, %s",
        config.job.namespace,
        config.job.name,
        node.rank,
        node.count,
        "CPU" if cpu else "GPU",
    )
    return Launcher(config, node, cpu, os.environ, supervisor, reporter).run()


def _stopped(detail: str) -> Verdict:
    return Verdict(Reason.PREEMPTED, f"Stopped by SIGTERM: {detail}.", time=utc_now())


def _last_word(verdict: Verdict, supervisor: Supervisor, environment: Mapping[str, str]) -> None:
    """The termination message: a failure's, or rank 0's success. Other nodes end silently after success."""
    if verdict.reason is not None:
        log.error("%s (exit code %d): %s", verdict.reason, verdict.exit_code, verdict.message)
        text = render_termination(_failure(verdict, supervisor))
    elif verdict.success is not None:
        text = render_termination(verdict.success)
    else:
        return
    path = Path(environment.get(names.ENV_TERMINATION_LOG, names.TERMINATION_LOG))
    try:
        # In place: the kubelet mounts this very file, it cannot be replaced.
        path.write_text(text)
    except OSError as error:
        log.error("%s: the termination message cannot be written: %s", path, error)


def _failure(verdict: Verdict, supervisor: Supervisor) -> Failure:
    assert verdict.reason is not None
    return Failure(
        reason=verdict.reason,
        message=verdict.message,
        rank=verdict.rank,
        step=verdict.step,
        exit_code=verdict.exit_code,
        signal=verdict.signal,
        log_tail=verdict.tail or supervisor.log.tail(verdict.rank) or None,
        time=verdict.time or utc_now(),
    )
