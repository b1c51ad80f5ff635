"""The launcher's watch over the ranks of its pod: sends on what rank 0 reports, answers a wish for stacks, and ends a
run that stands still and that nobody else ends.

Two look for a hang. The operator does where reports reach it: `stallSeconds` after the loop last got on it asks for
stacks, then deletes the pods. The launcher's own limit comes later by MARGIN_SECONDS, so that the operator is first;
without a status server it is `stallSeconds` itself.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from posttrain_api import names
from posttrain_api.records import Report
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import signs, stacks
from posttrain_trainer.fence import current_attempt
from posttrain_trainer.pulse import Pulse
from posttrain_trainer.reporter import Reporter
from posttrain_trainer.stacks import Hang, Stack
from posttrain_trainer.supervise import Supervisor

log = logging.getLogger("posttrain.launcher")
ENV_MARGIN_SECONDS = "POSTTRAIN_HANG_MARGIN_SECONDS"
"""Another margin than MARGIN_SECONDS, for tests."""
MARGIN_SECONDS = 300.0
"""What the operator has to see a hang, to collect stacks and to restart, before the launcher ends the run itself."""
STORE_SECONDS = 10.0
"""What storage has to take the stacks: it may be what hangs."""


@dataclass(frozen=True)
class Limits:
    """Seconds without an advance, after which the launcher ends the run. `margin`: so much later than the operator."""

    stall: float
    margin: float

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Limits:
        """As the pod's environment says."""
        return cls(
            float(environment.get(names.ENV_STALL_SECONDS, names.STALL_SECONDS)),
            float(environment.get(ENV_MARGIN_SECONDS, MARGIN_SECONDS)),
        )

    def seconds(self, told: int | None, has_server: bool) -> float:
        """`told`: stallSeconds as the operator says it now."""
        return (self.stall if told is None else told) + (self.margin if has_server else 0.0)


class Vigil:
    """Called about every second while this node's ranks run. `hang` is there once it has given them up."""

    def __init__(
        self,
        config: TrainerConfig,
        ranks: Sequence[int],
        supervisor: Supervisor,
        reporter: Reporter,
        limits: Limits,
    ) -> None:
        self.hang: Hang | None = None
        self.folder = signs_folder(config)
        self._config, self._ranks, self._supervisor, self._reporter = config, ranks, supervisor, reporter
        self._limits = limits
        self._pulse = Pulse(self.folder)
        self._reported = ""
        self._step: int | None = None
        self._answered = False
        clear(self.folder)

    def __call__(self) -> bool:
        """False: the run has stood still for too long and is to be ended."""
        advanced = self._pulse.look()
        self.tell(advanced)
        self._answer()
        limit = self._limits.seconds(self._reporter.wishes.stall_seconds, self._reporter.has_server)
        idle = 0.0 if advanced is None else time.monotonic() - advanced
        if idle < limit or self._supervisor.stopping:
            return True
        found = self._collect()
        self.hang = Hang(idle, limit, self._step, found, self._keep(found))
        return False

    def tell(self, advanced: float | None = None) -> None:
        """Sends on what rank 0 has left; nothing new is no report."""
        if advanced is not None:
            self._reporter.advanced(advanced)
        text = _text(self.folder / signs.REPORT)
        if text and text != self._reported:
            self._reported = text
            try:
                report = Report.model_validate_json(text)
            except ValidationError:  # rank 0 checks what it says; what else may write here means nothing
                log.warning("%s: not a report", self.folder / signs.REPORT, exc_info=True)
            else:
                self._step = report.step
                self._reporter.report(report)

    def _answer(self) -> None:
        """Once for each time that the operator begins to wish it."""
        wished = self._reporter.wishes.dump
        if wished and not self._answered:
            found = self._collect()
            for each in found:
                self._reporter.stacks(each.rank, each.text)
            self._keep(found)
        self._answered = wished

    def _collect(self) -> list[Stack]:
        found = stacks.collect(self.folder, self._ranks, self._supervisor.child)
        for each in found:
            log.info("stacks of rank %d: %s", each.rank, each.text)
        return found

    def _keep(self, found: Sequence[Stack]) -> str | None:
        """Writes them to the job's storage; None where it does not take them in time."""
        done = threading.Event()
        thread = threading.Thread(target=_store, args=(Path(self._config.run_dir), found, done), daemon=True)
        thread.start()
        thread.join(STORE_SECONDS)
        return f"{self._config.run_uri}/{names.STACKS_DIR}/" if done.is_set() else None


def _store(run_dir: Path, found: Sequence[Stack], done: threading.Event) -> None:
    try:
        attempt = current_attempt(run_dir) or 0
        folder = run_dir / names.STACKS_DIR
        folder.mkdir(parents=True, exist_ok=True)
        for each in found:
            (folder / f"{attempt}-rank-{each.rank}.txt").write_text(each.text + "\n")
    except OSError as error:
        log.warning("the stacks are in this log only, %s does not take them: %s", run_dir, error)
    else:
        done.set()


def signs_folder(config: TrainerConfig) -> Path:
    """Where the ranks of this pod leave their signs."""
    return Path(config.work_dir) / signs.FOLDER


def clear(folder: Path) -> None:
    """What an earlier start of the same container left must not be taken for a sign of this one."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
