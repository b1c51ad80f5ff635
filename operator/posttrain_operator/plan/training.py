"""The trainer's data, training and checkpoint records: what the spec says, else the table's row."""

from __future__ import annotations

from typing import Literal, TypeVar

from posttrain_api.reasons import Reason
from posttrain_api.spec.data import BadRows, Columns
from posttrain_api.spec.data import DataSource as DataSourceSpec
from posttrain_api.spec.training import CheckpointPolicy, Lora, Training
from posttrain_api.trainer import CheckpointConfig, DataConfig, DataSource, LoraConfig, TrainingConfig
from posttrain_operator.plan.chain import ModelPlace, parent_of
from posttrain_operator.plan.context import Context
from posttrain_operator.plan.defaults import CHECKPOINT_SECONDS, KEEP_LAST, LORA_RANK, TOKENS_PER_MICRO_BATCH
from posttrain_operator.plan.errors import refuse
from posttrain_operator.plan.model import max_length
from posttrain_operator.plan.sources import Location, locate

T = TypeVar("T")


def pick(said: T | None, default: T) -> T:
    """The spec's word where there is one."""
    return default if said is None else said


def data_locations(context: Context, kind: str) -> tuple[Location, ...]:
    """Where the `train` or `eval` sets are, in their order."""
    sources = getattr(context.spec.data, kind) or ()
    return tuple(
        locate(source.uri, source.secret_ref, context.settings, f"spec.data.{kind}[{index}].uri")
        for index, source in enumerate(sources)
    )


def data_config(context: Context, train: tuple[Location, ...], evaluation: tuple[Location, ...]) -> DataConfig:
    """The rows, their limits, and what happens to those that do not fit."""
    data, defaults = context.spec.data, context.defaults
    bad = data.bad_rows or BadRows()
    return DataConfig(
        train=_sets(data.train, train),
        eval=_sets(data.eval or (), evaluation),
        max_length=max_length(context),
        max_prompt_length=_prompt_length(context),
        loss_on=defaults.loss_on if data.loss_on in (None, "Auto") else data.loss_on,
        too_long=pick(data.too_long, defaults.too_long),
        too_long_max_fraction=pick(data.too_long_max_fraction, defaults.too_long_max_fraction),
        bad_rows_policy=pick(bad.policy, defaults.bad_rows_policy),
        bad_rows_max_fraction=pick(bad.max_fraction, defaults.bad_rows_max_fraction),
    )


def _prompt_length(context: Context) -> int | None:
    said, longest = context.spec.data.max_prompt_length, max_length(context)
    if said is not None and said >= longest:
        raise refuse(
            "spec.data.maxPromptLength",
            f"must be less than the longest sequence ({longest} tokens)",
            said,
            "choose less, or set data.maxLength: the answer needs room",
        )
    return said


def _sets(specs: tuple[DataSourceSpec, ...], locations: tuple[Location, ...]) -> tuple[DataSource, ...]:
    return tuple(
        DataSource(
            **location.source.model_dump(),
            format=spec.format or "Auto",
            split=spec.split,
            subset=spec.subset,
            columns=(spec.columns or Columns()).to_wire(),
            max_rows=spec.max_rows,
            weight=pick(spec.weight, 1.0),
        )
        for spec, location in zip(specs, locations, strict=True)
    )


def training_config(context: Context) -> TrainingConfig:
    """The optimizer's record. `epochs` is None exactly where maxSteps is said."""
    said, defaults = context.spec.training or Training(), context.defaults
    beta1, beta2 = pick(said.betas, defaults.betas)
    return TrainingConfig(
        epochs=None if said.max_steps is not None else pick(said.epochs, defaults.epochs),
        max_steps=said.max_steps,
        batch_size=pick(said.batch_size, defaults.batch_size),
        tokens_per_micro_batch=pick(said.tokens_per_micro_batch, max(TOKENS_PER_MICRO_BATCH, max_length(context))),
        learning_rate=pick(said.learning_rate, defaults.learning_rate),
        schedule=pick(said.schedule, defaults.schedule),
        warmup_steps=pick(said.warmup_steps, "Auto"),
        min_learning_rate_ratio=pick(said.min_learning_rate_ratio, defaults.min_learning_rate_ratio),
        weight_decay=pick(said.weight_decay, defaults.weight_decay),
        beta1=beta1,
        beta2=beta2,
        epsilon=pick(said.epsilon, defaults.epsilon),
        max_grad_norm=pick(said.max_grad_norm, defaults.max_grad_norm),
        seed=pick(said.seed, defaults.seed),
        precision=said.precision or _precision(context),
        gradient_checkpointing=pick(said.gradient_checkpointing, "Auto"),
    )


def _precision(context: Context) -> Literal["BF16", "FP32"]:
    """BF16 where GPUs compute. A GPU job on a platform that lets it run on the CPU, as the demo's, computes in FP32:
    BF16 is slower there."""
    resources = context.spec.resources
    on_cpu = context.settings.allow_cpu or (resources is not None and resources.gpus_per_node == 0)
    return "FP32" if on_cpu else "BF16"


def lora_config(context: Context, place: ModelPlace | None) -> LoraConfig | None:
    """The adapter's record, None for full tuning. One that is continued keeps its shape."""
    if context.tuning == "Full":
        return None
    said = context.spec.lora or Lora()
    if said.continue_adapter:
        return _continued(context, said, place)
    rank = pick(said.rank, LORA_RANK)
    return LoraConfig(
        rank=rank,
        alpha=pick(said.alpha, 2.0 * rank),
        dropout=pick(said.dropout, 0.0),
        target_modules=pick(said.target_modules, ("all-linear",)),
        rslora=bool(said.rslora),
        dora=bool(said.dora),
        quantization=said.quantization,
    )


def _continued(context: Context, said: Lora, place: ModelPlace | None) -> LoraConfig:
    parent = context.spec.model.from_job
    assert parent is not None  # a rule
    if place is None or not place.adapters:
        raise refuse(
            "spec.lora.continueAdapter",
            f"needs a job whose output is an adapter; that of {parent.name} is a whole model",
            True,
            "remove it: a new adapter is then trained on that model",
            Reason.UNSUPPORTED,
        )
    if (context.parents[parent.name].stage == "RewardModel") != (context.spec.stage == "RewardModel"):
        raise refuse(
            "spec.lora.continueAdapter",
            f"needs an adapter of the same kind of model; that of {parent.name} has another head",
            True,
            "remove it: a new adapter is then trained on that model",
            Reason.UNSUPPORTED,
        )
    shape = place.shape
    return LoraConfig(
        rank=shape.get("rank", LORA_RANK),
        alpha=shape.get("alpha", 2.0 * shape.get("rank", LORA_RANK)),
        dropout=pick(said.dropout, 0.0),
        target_modules=tuple(shape.get("targetModules") or ("all-linear",)),
        rslora=bool(shape.get("rslora")),
        dora=bool(shape.get("dora")),
        continue_adapter=True,
        quantization=said.quantization,
    )


def checkpoint_location(context: Context) -> Location | None:
    """The checkpoint of another job to start from, None for none."""
    start = context.spec.checkpoint.from_ if context.spec.checkpoint else None
    if start is None:
        return None
    if start.uri is not None:
        return locate(start.uri, None, context.settings, "spec.checkpoint.from.uri")
    assert start.from_job is not None  # the one-of rule
    parent = parent_of(context, start.from_job, "spec.checkpoint.from.fromJob")
    if parent.checkpoint is None:
        raise refuse(
            "spec.checkpoint.from.fromJob.name",
            "names a job that has no checkpoint",
            parent.name,
            "name another job, or remove it",
            Reason.UNSUPPORTED,
        )
    # The folder of all of them: where the newest is damaged, the one before it serves.
    folder = parent.checkpoint.uri.rstrip("/").rpartition("/")[0]
    return locate(folder, None, context.settings, "spec.checkpoint.from.fromJob.name")


def checkpoint_config(context: Context, start: Location | None) -> CheckpointConfig:
    """When to save, what to keep, where to start."""
    said = context.spec.checkpoint or CheckpointPolicy()
    return CheckpointConfig(
        every_steps=said.every_steps,
        every_seconds=pick(said.every_seconds, CHECKPOINT_SECONDS),
        keep_last=pick(said.keep_last, KEEP_LAST),
        resume=said.resume or "Auto",
        staging=said.staging,
        start_from=start.source if start else None,
    )
