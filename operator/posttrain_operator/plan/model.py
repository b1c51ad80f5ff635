"""The starting model of a plan and its reference: a source, a finished parent's model, or a shape to make it from."""

from __future__ import annotations

from posttrain_api.places import Source
from posttrain_api.rules.online_rules import MAX_NEW_TOKENS
from posttrain_api.rules.types import matches
from posttrain_api.rules.uris import PINNED
from posttrain_api.spec.online import Rollout
from posttrain_api.spec.references import ReferenceRef
from posttrain_api.spec.references import Scratch as ScratchSpec
from posttrain_api.spec.rewards import RewardModelRef
from posttrain_api.trainer import ModelConfig, ReferenceConfig, Scratch
from posttrain_operator.plan.chain import Kind, ModelPlace, trained
from posttrain_operator.plan.context import Context
from posttrain_operator.plan.defaults import MAX_LENGTH, PROMPT_LENGTH
from posttrain_operator.plan.errors import refuse
from posttrain_operator.plan.sources import locate


def max_length(context: Context) -> int:
    """Longest sequence: said, or 2048, or what a model from scratch is made for where that is less; in stage RL, unless
    said, the longest prompt and the longest completion together."""
    spec = context.spec
    if spec.data.max_length is not None:
        return spec.data.max_length
    if spec.stage == "RL":
        new = (spec.rollout or Rollout()).max_new_tokens or MAX_NEW_TOKENS
        return (spec.data.max_prompt_length or PROMPT_LENGTH) + new
    made_for = spec.model.scratch.max_length if spec.model.scratch else None
    return min(MAX_LENGTH, made_for or MAX_LENGTH)


def model_place(context: Context) -> ModelPlace | None:
    """Where the model, or a scratch model's tokenizer, is; None where nothing is needed from anywhere."""
    model = context.spec.model
    if model.uri is not None:
        said = model.secret_ref.name if model.secret_ref else None
        return ModelPlace(locate(model.uri, model.secret_ref, context.settings, "spec.model.uri"), base_secret=said)
    if model.from_job is not None:
        kind: Kind = "either" if context.spec.stage == "RewardModel" else "answers"
        return _pinned_code(context, trained(context, model.from_job, "spec.model.fromJob", kind))
    tokenizer = model.scratch.tokenizer if model.scratch else None
    if tokenizer is None:
        return None
    place = locate(tokenizer.uri, tokenizer.secret_ref, context.settings, "spec.model.scratch.tokenizer.uri")
    return ModelPlace(place)


def _pinned_code(context: Context, place: ModelPlace) -> ModelPlace:
    """Code that comes with the base of a chain runs at a commit only, as that of model.uri."""
    uri = place.base.source.uri
    if context.spec.model.trust_remote_code and uri.startswith("hf://") and not matches(uri, PINNED):
        raise refuse(
            "spec.model.trustRemoteCode",
            "needs a model whose code is pinned; the base of this job's chain of adapters is not",
            uri,
            "start the chain from hf://org/name@<40-character commit>",
        )
    return place


def reference_place(context: Context) -> ModelPlace | None:
    """Where the model is that the policy is compared with; None: it is the starting model."""
    said = context.spec.reference
    return beside_place(context, said, "spec.reference", "answers") if said else None


def beside_place(context: Context, said: ReferenceRef | RewardModelRef, path: str, kind: Kind) -> ModelPlace:
    """Where a model beside the policy is; `path` of its field, `kind`: what it must be able to do."""
    if said.from_job is not None:
        return trained(context, said.from_job, f"{path}.fromJob", kind)
    assert said.uri is not None  # the one-of rule
    return ModelPlace(locate(said.uri, said.secret_ref, context.settings, f"{path}.uri"))


def reference_config(place: ModelPlace | None) -> ReferenceConfig | None:
    """The trainer's reference record."""
    return ReferenceConfig(source=place.base.source, adapters=_sources(place)) if place else None


def _sources(place: ModelPlace) -> tuple[Source, ...]:
    return tuple(adapter.source for adapter in place.adapters)


def model_config(context: Context, place: ModelPlace | None) -> ModelConfig:
    """The trainer's model record."""
    model = context.spec.model
    source = place.base.source if place else None
    scratch = scratch_config(model.scratch, max_length(context), source) if model.scratch else None
    return ModelConfig(
        source=None if scratch else source,
        adapters=_sources(place) if place else (),
        scratch=scratch,
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
