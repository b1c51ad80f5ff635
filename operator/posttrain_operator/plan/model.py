"""The starting model of a plan: a source, a finished parent's output, or a shape to make it from."""

from __future__ import annotations

from posttrain_api.reasons import Reason
from posttrain_api.spec.references import JobRef
from posttrain_api.spec.references import Scratch as ScratchSpec
from posttrain_api.trainer import ModelConfig, Scratch, Source
from posttrain_operator.plan.context import Context
from posttrain_operator.plan.defaults import MAX_LENGTH
from posttrain_operator.plan.errors import refuse
from posttrain_operator.plan.sources import Location, locate
from posttrain_operator.plan.types import Parent


def max_length(context: Context) -> int:
    """Longest sequence: said, or 2048, or what a model from scratch is made for where that is less."""
    spec = context.spec
    if spec.data.max_length is not None:
        return spec.data.max_length
    made_for = spec.model.scratch.max_length if spec.model.scratch else None
    return min(MAX_LENGTH, made_for or MAX_LENGTH)


def model_location(context: Context) -> Location | None:
    """Where the model, or a scratch model's tokenizer, is; None where nothing is needed from anywhere."""
    model = context.spec.model
    if model.uri is not None:
        return locate(model.uri, model.secret_ref, context.settings, "spec.model.uri")
    if model.from_job is not None:
        return _parent_output(context, model.from_job)
    tokenizer = model.scratch.tokenizer if model.scratch else None
    if tokenizer is None:
        return None
    return locate(tokenizer.uri, tokenizer.secret_ref, context.settings, "spec.model.scratch.tokenizer.uri")


def model_config(context: Context, location: Location | None) -> ModelConfig:
    """The trainer's model record."""
    model = context.spec.model
    source = location.source if location else None
    scratch = scratch_config(model.scratch, max_length(context), source) if model.scratch else None
    return ModelConfig(
        source=None if scratch else source,
        scratch=scratch,
        dtype=model.dtype or "Auto",
        attention=model.attention or "Auto",
        trust_remote_code=bool(model.trust_remote_code),
        chat_template=model.chat_template,
    )


def scratch_config(shape: ScratchSpec, longest: int, tokenizer: Source | None) -> Scratch:
    """The shape with its defaults: intermediateSize 4 x hiddenSize, kvHeads = heads, headDim = hiddenSize / heads."""
    return Scratch(
        family=shape.family,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size or 4 * shape.hidden_size,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads or shape.heads,
        head_dim=shape.head_dim or shape.hidden_size // shape.heads,
        max_length=shape.max_length or longest,
        tokenizer=tokenizer,
    )


def parameters_of(shape: Scratch) -> int:
    """Parameters of a Llama-shaped model with its head untied: 2·V·h + L·(2·h·d·(heads + kv) + 3·h·i + 2·h) + h."""
    attention = 2 * shape.hidden_size * shape.head_dim * (shape.heads + shape.kv_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size + 2 * shape.hidden_size
    return 2 * shape.vocab_size * shape.hidden_size + shape.layers * layer + shape.hidden_size


def parent_of(context: Context, reference: JobRef, path: str) -> Parent:
    """The finished parent. PlanError(WaitingForDependency) where the caller gave none: waiting is the operator's
    business."""
    parent = context.parents.get(reference.name)
    if parent is None:
        raise refuse(
            f"{path}.name",
            "names a job that has not succeeded yet",
            reference.name,
            "wait for it, or name another job",
            Reason.WAITING_FOR_DEPENDENCY,
        )
    return parent


def _parent_output(context: Context, reference: JobRef) -> Location:
    parent = parent_of(context, reference, "spec.model.fromJob")
    if parent.output.format == "peft":
        raise refuse(
            "spec.model.fromJob.name",
            "names a job whose output is an adapter, which cannot be trained further yet",
            reference.name,
            "run that job with output: {mergeAdapter: true} and start from its merged model",
            Reason.UNSUPPORTED,
        )
    if not parent.output.uri.startswith("pvc://"):
        raise refuse(
            "spec.model.fromJob.name",
            "names a job whose output is on no claim",
            parent.output.uri,
            "give its location as model.uri",
            Reason.UNSUPPORTED,
        )
    return locate(parent.output.uri, None, context.settings, "spec.model.fromJob.name")
