"""`build_plan`: from a parsed job, the platform's settings and finished parents to the Plan. Pure.

Called by reconcile before anything is created, by `posttrain run` and by `posttrain validate --resolved`. Equal
inputs give equal plans, and
the hash says so.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from posttrain_api import names
from posttrain_api.base import canonical_json
from posttrain_api.job import Job
from posttrain_api.trainer import JobIdentity, TrainerConfig
from posttrain_operator.plan import objectives, online, pods
from posttrain_operator.plan.chain import ModelPlace
from posttrain_operator.plan.context import Context, context_of
from posttrain_operator.plan.guards import guarded
from posttrain_operator.plan.model import model_config, model_place, reference_config, reference_place
from posttrain_operator.plan.resolved import Chosen, resolved_values
from posttrain_operator.plan.rewards import RewardPlace, reward_configs, reward_places
from posttrain_operator.plan.sources import Location
from posttrain_operator.plan.training import (
    checkpoint_config,
    checkpoint_location,
    data_config,
    data_locations,
    lora_config,
    training_config,
)
from posttrain_operator.plan.types import Parent, Plan, PlanSettings


def build_plan(job: Job, settings: PlanSettings, parents: Mapping[str, Parent]) -> Plan:
    """The plan of a job. PlanError where none follows; its reason is WaitingForDependency where `parents` lacks one.

    ValueError for a job without a uid: its folder would be that of every job of this name.
    """
    if not job.uid:
        raise ValueError(f"job {job.name} has no uid yet")
    context = context_of(job, settings, parents)
    locations = _Locations.of(context)
    config = guarded(context, _trainer_config(context, locations))
    pod = pods.resources(context, config.topology)
    place = pods.placement(context)
    image = job.spec.image or settings.trainer_image
    plan = Plan(
        config=config,
        image=image,
        image_pull_policy=settings.image_pull_policy,
        resources=pod,
        placement=place,
        storage_claim=job.storage_claim,
        new_claim=pods.new_claim(context),
        claims=locations.all("claims"),
        config_maps=locations.all("config_maps"),
        secrets=locations.all("secrets"),
        shared_secrets=locations.shared_secrets(),
        env=pods.environment(context, config.topology, pod),
        rendezvous_port=settings.rendezvous_port,
        metrics_port=settings.metrics_port,
        grace_seconds=config.grace_seconds,
        resolved=resolved_values(
            config, Chosen(image, pod, place, locations.model.base_secret if locations.model else None)
        ),
        spec_hash="",
    )
    return replace(plan, spec_hash=_hash(plan))


@dataclass(frozen=True)
class _Locations:
    """Every place the job reads from, by its use."""

    model: ModelPlace | None
    reference: ModelPlace | None
    critic: ModelPlace | None
    rewards: tuple[RewardPlace, ...]
    train: tuple[Location, ...]
    eval: tuple[Location, ...]
    checkpoint: Location | None

    @classmethod
    def of(cls, context: Context) -> _Locations:
        """Locates them all; PlanError on the first that cannot be."""
        return cls(
            model=model_place(context),
            reference=reference_place(context),
            critic=online.critic_place(context),
            rewards=reward_places(context),
            train=data_locations(context, "train"),
            eval=data_locations(context, "eval"),
            checkpoint=checkpoint_location(context),
        )

    def all(self, kind: str) -> tuple[str, ...]:
        """Sorted names of the claims, config_maps or secrets that all places need."""
        models = (self.model, self.reference, self.critic, *(reward.model for reward in self.rewards))
        places = [place for model in models if model for place in model.places]
        places += [*self.train, *self.eval, *([self.checkpoint] if self.checkpoint else [])]
        needed = [getattr(place, kind) for place in places]
        needed += [getattr(reward, kind) for reward in self.rewards] if kind != "claims" else []
        return tuple(sorted(frozenset().union(*needed)))

    def shared_secrets(self) -> tuple[str, ...]:
        """Of the secrets those that every pod needs."""
        return tuple(sorted(frozenset().union(*(reward.secrets for reward in self.rewards))))


def _trainer_config(context: Context, locations: _Locations) -> TrainerConfig:
    job, spec = context.job, context.spec
    folder = names.run_path(job.name, job.uid)
    model, training = model_config(context, locations.model), training_config(context)
    return TrainerConfig(
        job=JobIdentity(namespace=job.namespace, name=job.name, uid=job.uid),
        stage=spec.stage,
        tuning=context.tuning,
        algorithm=objectives.algorithm(context),
        lora=lora_config(context, locations.model),
        model=model,
        reference=reference_config(locations.reference),
        data=data_config(context, locations.train, locations.eval),
        training=training,
        zero_stage=objectives.zero_stage(context),
        deepspeed=objectives.deepspeed_config(context),
        preference=objectives.preference_config(context),
        reward_model=objectives.reward_model_config(context),
        rollout=online.rollout_config(context, training.batch_size),
        rewards=reward_configs(context, locations.rewards),
        grpo=online.grpo_config(context),
        ppo=online.ppo_config(context),
        rloo=online.rloo_config(context),
        critic=online.critic_config(context, locations.critic, training.learning_rate),
        evaluation=objectives.evaluation_config(context),
        checkpoint=checkpoint_config(context, locations.checkpoint),
        merge_adapter=bool(spec.output and spec.output.merge_adapter),
        topology=pods.topology(context),
        run_dir=posixpath.join(context.settings.storage_dir, folder),
        run_uri=f"pvc://{job.storage_claim}/{folder}",
        work_dir=context.settings.work_dir,
        grace_seconds=pods.grace_seconds(context, model.scratch),
    )


def _hash(plan: Plan) -> str:
    rest = {
        field.name: getattr(plan, field.name) for field in fields(plan) if field.name not in ("config", "spec_hash")
    }
    rest |= {"resources": asdict(plan.resources), "placement": asdict(plan.placement)}
    rest["new_claim"] = asdict(plan.new_claim) if plan.new_claim else None
    values = {**rest, "config": plan.config.to_wire()}
    return "sha256:" + hashlib.sha256(canonical_json(values).encode()).hexdigest()
