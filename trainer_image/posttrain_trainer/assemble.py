"""From configuration and prepared data to the parts of the loop. The worker calls it once the process group stands.

The only module that knows every other: it makes them and hands them over, and does nothing with them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from posttrain_api.reasons import Reason
from posttrain_api.records import Resolved
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import nf4
from posttrain_trainer.algorithms import algorithm_of
from posttrain_trainer.batching import Feed, Share
from posttrain_trainer.best import judge_of
from posttrain_trainer.checkpoint import Checkpoints, Place
from posttrain_trainer.checkpoint_facts import facts_of
from posttrain_trainer.critic_model import build_critic, build_policy
from posttrain_trainer.dropout import without_dropout
from posttrain_trainer.engine import AdamSettings, Engine, MakeOptimizer, Trained, adamw
from posttrain_trainer.engine_config import EngineSettings
from posttrain_trainer.errors import TrainerFailure
from posttrain_trainer.evaluate import Evaluator
from posttrain_trainer.fence import Fence, current_attempt
from posttrain_trainer.loop import Course, Parts
from posttrain_trainer.mixture import epoch_rows, parts_of
from posttrain_trainer.model import check_unchanged, count
from posttrain_trainer.packing import packs
from posttrain_trainer.prepared import Prepared
from posttrain_trainer.record import ENV_ATTEMPT
from posttrain_trainer.recorder import Observer, Recorder, Sink
from posttrain_trainer.reference_choice import Compared
from posttrain_trainer.roles import SharedEngine, critic_engine, policy_engine
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.sampler import Sampler, total_rows
from posttrain_trainer.schedule import Schedule
from posttrain_trainer.tokenset import TokenSet


@dataclass(frozen=True)
class Job:
    """What a rank was given: the configuration, the prepared data, and where it runs."""

    config: TrainerConfig
    prepared: Prepared
    runtime: Runtime


@dataclass(frozen=True)
class Outside:
    """Where reports and step metrics go; empty on every rank but 0."""

    sinks: Sequence[Sink] = ()
    observers: Sequence[Observer] = ()


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
    engine = _engine(job, module, make_optimizer or adamw(_adam(config)))
    algorithm = algorithm_of(config)
    part = Share(
        job.runtime.rank,
        job.runtime.ranks,
        config.training.tokens_per_micro_batch,
        whole=algorithm.needs == "score",
        packed=packed,
    )
    sets = _sets(prepared)
    compared = Compared(config, prepared, job.runtime, engine, part)
    references = compared.references(algorithm, sets)
    evaluator = None
    if len(sets) > 1:
        evaluator = Evaluator(sets[1][1], part, algorithm, job.runtime, references[1])
    recorder = Recorder(resolved.total_steps, outside.sinks, outside.observers)
    feed = _feed(job, sets[0][1], part)
    start = compared.start(algorithm)
    parts = Parts(engine, feed, algorithm, _checkpoints(job), recorder, evaluator, references[0], start)
    return parts, resolved


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


def _engine(job: Job, module: nn.Module, make_optimizer: MakeOptimizer) -> Engine:
    config, training, resolved = job.config, job.config.training, job.prepared.resolved
    settings = EngineSettings(
        zero_stage=resolved.zero_stage,
        max_grad_norm=training.max_grad_norm,
        adapter=config.tuning == "LoRA",
        bf16=resolved.precision == "BF16",
        quantized=nf4.asked(config),
        offload_optimizer=config.deepspeed.offload_optimizer,
        offload_parameters=config.deepspeed.offload_parameters,
        overrides=config.deepspeed.overrides,
    )
    if job.config.stage in ("RewardModel", "Preference", "RL"):
        without_dropout(module)
    module.train()
    return policy_engine(module, make_optimizer, settings, training.weight_decay)


def critic_of(job: Job, engine: Engine, packed: bool, make_optimizer: MakeOptimizer) -> Trained | None:
    """PPO's critic beside the policy's engine, or on it. None for every other algorithm."""
    config, attention = job.config, job.prepared.resolved.attention
    if config.stage != "RL" or config.algorithm != "PPO":
        return None
    if isinstance(engine, SharedEngine):
        return engine.critic
    module = build_critic(config, job.prepared)
    if packed:  # where it cannot, transformers' mask does the same more slowly
        packs(module, attention, job.runtime.device)
    without_dropout(module)
    module.train()
    return critic_engine(module, make_optimizer, engine.settings, config.training.weight_decay)


def _adam(config: TrainerConfig) -> AdamSettings:
    return AdamSettings(config.training.beta1, config.training.beta2, config.training.epsilon)


def _feed(job: Job, tokens: TokenSet, part: Share) -> Feed:
    training, resolved = job.config.training, job.prepared.resolved
    parts = parts_of(job.config.data.train, tokens.sources)
    size = epoch_rows(parts)
    total = total_rows(size, training.batch_size, training.epochs, training.max_steps)
    sampler = Sampler(size, training.batch_size, total, training.seed, parts)
    if sampler.steps != resolved.total_steps:
        raise TrainerFailure(
            Reason.TRAINER_ERROR,
            f"{job.prepared.train_dir}: {len(tokens)} rows give {sampler.steps} steps, "
            f"prepare settled {resolved.total_steps}. Remove the prepared folder, so that it is made anew.",
        )
    return Feed(tokens, sampler, part)


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
    )
    # All ranks write into one temporary folder, and its name has the number: rank 0's counts, whatever others see.
    attempt: int = job.runtime.control.gather(_attempt(config))[0]
    fence = Fence(run_dir, attempt)
    return Checkpoints(place, job.runtime, facts_of(config, job.prepared, job.runtime.ranks), fence)


def _attempt(config: TrainerConfig) -> int:
    """Only the first node is told; the others, which write nothing, look."""
    told = os.environ.get(ENV_ATTEMPT)
    return int(told) if told else current_attempt(Path(config.run_dir)) or 0


def _sets(prepared: Prepared) -> list[tuple[Path, TokenSet]]:
    """The training set, and the held-out set where there is one, each with its folder."""
    folders = [Path(folder) for folder in (prepared.train_dir, prepared.eval_dir) if folder is not None]
    return [(folder, _tokens(folder)) for folder in folders]


def _tokens(folder: Path) -> TokenSet:
    try:
        return TokenSet(folder)
    except FileNotFoundError as error:
        raise TrainerFailure(
            Reason.DATASET_NOT_FOUND,
            f"{folder}: the prepared token set is incomplete ({error.filename} is missing). "
            "Remove the prepared folder and run the job anew.",
        ) from error
