"""What a rank was given: made by the worker once the process group stands, handed to whatever assembles the parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain_api.reasons import Reason
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.mixture import epoch_rows, parts_of
from posttrain_trainer.prepared import Prepared
from posttrain_trainer.recorder import Observer, Sink
from posttrain_trainer.resolve import rows_per_step
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.sampler import Sampler, total_rows


@dataclass(frozen=True)
class Job:
    """The configuration, the prepared data, and where it runs."""

    config: TrainerConfig
    prepared: Prepared
    runtime: Runtime

    def sampler(self, sources: Sequence[int]) -> Sampler:
        """Which rows a step takes; in stage RL a step is a rollout. sources: rows of each. TrainerFailure where that
        are other steps than `prepare` settled."""
        training, settled = self.config.training, self.prepared.resolved.total_steps
        batch = rows_per_step(self.config)
        parts = parts_of(self.config.data.train, sources)
        size = epoch_rows(parts)
        total = total_rows(size, batch, training.epochs, training.max_steps)
        sampler = Sampler(size, batch, total, training.seed, parts)
        if sampler.steps != settled:
            raise TrainerFailure(
                Reason.TRAINER_ERROR,
                f"{self.prepared.train_dir}: {sum(sources)} rows give {sampler.steps} steps, "
                f"prepare settled {settled}. Remove the prepared folder, so that it is made anew.",
            )
        return sampler


@dataclass(frozen=True)
class Outside:
    """Where reports and step metrics go; empty on every rank but 0."""

    sinks: Sequence[Sink] = ()
    observers: Sequence[Observer] = ()
