"""From configuration and prepared data to the parts of the loop. The worker calls it once the process group stands.

The only module that knows every other: it makes them and hands them over, and does nothing with them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from posttrain_api.names import STAGING_DIR
from posttrain_api.records import Resolved
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.algorithms import algorithm_of
from posttrain_trainer.assemble_offline import Offline
from posttrain_trainer.assemble_online import Online
from posttrain_trainer.assemble_roles import adam, critic_of, engine_of
from posttrain_trainer.batching import Share
from posttrain_trainer.best import judge_of
from posttrain_trainer.checkpoint import Checkpoints
from posttrain_trainer.checkpoint_choice import Place
from posttrain_trainer.checkpoint_facts import facts_of
from posttrain_trainer.critic_model import build_policy
from posttrain_trainer.fence import Fence, current_attempt
from posttrain_trainer.guards import Guards
from posttrain_trainer.job import Job, Outside
from posttrain_trainer.loop import Course, Parts
from posttrain_trainer.model import check_unchanged, count
from posttrain_trainer.optimizers import MakeOptimizer, adamw
from posttrain_trainer.packing import packs
from posttrain_trainer.record import ENV_ATTEMPT
from posttrain_trainer.recorder import Recorder
from posttrain_trainer.reference_choice import Compared
from posttrain_trainer.schedule import Schedule


def assemble(job: Job, outside: Outside, make_optimizer: MakeOptimizer | None = None) -> tuple[Parts, Resolved]:
    """The parts, nothing started yet, and what was settled, with the parameter counts. `make_optimizer`: AdamW
    unless tests say another."""
    config, prepared = job.config, job.prepared
    if job.runtime.first and _attempt(config) > 1:  # in the first one `prepare` has just read it
        check_unchanged(config, prepared)
    module = build_policy(config, prepared)
    counts = count(module)
    packed = packs(module, prepared.resolved.attention, job.runtime.device)
    resolved = prepared.resolved.model_copy(
        update={"parameters": counts.parameters, "trainable_parameters": counts.trainable}
    )
    make = make_optimizer or adamw(adam(config))
    engine = engine_of(job, module, make)
    algorithm = algorithm_of(config)
    part = Share(
        job.runtime.rank,
        job.runtime.ranks,
        config.training.tokens_per_micro_batch,
        whole=algorithm.needs == "score",
        packed=packed,
    )
    compared = Compared(config, prepared, job.runtime, engine, part)
    recorder = Recorder(resolved.total_steps, outside.sinks, outside.observers)
    if config.stage == "RL":
        critic = critic_of(job, engine, packed, make)
        given = Online(job, engine, part, compared.by_token, critic, recorder.completions).parts()
    else:
        given = Offline(job, part, algorithm, compared).parts()
    common: dict[str, Any] = {
        "engine": engine,
        "algorithm": algorithm,
        "checkpoints": _checkpoints(job),
        "recorder": recorder,
        "guards": Guards(config.guards.rules, 0 if config.critic is None else config.critic.warmup_steps),
    }
    return Parts(**common, **given), resolved


def course_of(config: TrainerConfig, resolved: Resolved) -> Course:
    """When and how fast."""
    training = config.training
    schedule = Schedule(
        kind=training.schedule,
        peak=training.learning_rate,
        warmup_steps=resolved.warmup_steps,
        total_steps=resolved.total_steps,
        min_ratio=training.min_learning_rate_ratio,
    )
    every, save = config.evaluation.every_steps, config.checkpoint
    return Course(schedule, every, save.every_steps, save.every_seconds, judge_of(config))


def _checkpoints(job: Job) -> Checkpoints:
    config = job.config
    source = config.checkpoint.start_from
    run_dir = Path(config.run_dir)
    place = Place(
        run_dir=run_dir,
        uri=config.run_uri,
        keep=config.checkpoint.keep_last,
        resume=config.checkpoint.resume == "Auto",
        start_from=Path(source.path) if source is not None and source.path is not None else None,
        staging=Path(config.work_dir) / STAGING_DIR if config.checkpoint.staging is not None else None,
    )
    # All ranks write into one temporary folder, and its name has the number: rank 0's counts, whatever others see.
    attempt: int = job.runtime.control.gather(_attempt(config))[0]
    fence = Fence(run_dir, attempt)
    return Checkpoints(place, job.runtime, facts_of(config, job.prepared, job.runtime.ranks), fence)


def _attempt(config: TrainerConfig) -> int:
    """Only the first node is told; the others, which write nothing, look."""
    told = os.environ.get(ENV_ATTEMPT)
    return int(told) if told else current_attempt(Path(config.run_dir)) or 0
