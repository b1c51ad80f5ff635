"""What must be alike for a checkpoint to be resumed, and how a difference is said.

Used by checkpoint.py: written into every checkpoint, compared before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from posttrain_api.base import canonical_json
from posttrain_api.online import CriticConfig
from posttrain_api.trainer import TrainerConfig
from posttrain_trainer.engine_adopt import Written
from posttrain_trainer.prepared import Prepared

Scalar = str | int | float | None
WORLD_SIZE, ZERO_STAGE, OVERRIDES = "world size", "deepspeed.zeroStage", "deepspeed.overrides"


@dataclass(frozen=True)
class Facts:
    """`shape`: what the state itself depends on, needed by every resume. `layout`: how DeepSpeed has cut it into files;
    a job that starts from another's checkpoint may cut it anew. `course`: what the rest of the training depends on;
    such a job may set it anew."""

    shape: dict[str, Scalar]
    layout: dict[str, Scalar]
    course: dict[str, Scalar]

    @classmethod
    def from_wire(cls, wire: dict[str, dict[str, Scalar]]) -> Facts:
        """What a checkpoint says, of a release too that counted the layout to the shape."""
        shape, layout = dict(wire["shape"]), dict(wire.get("layout") or {})
        layout |= {name: shape.pop(name) for name in (WORLD_SIZE, ZERO_STAGE, OVERRIDES) if name in shape}
        return cls(shape, layout, wire["course"])

    @property
    def seed(self) -> int:
        """training.seed."""
        return int(self.shape["training.seed"] or 0)

    @property
    def written(self) -> Written:
        """Who wrote it."""
        return Written(ranks=int(self.layout[WORLD_SIZE] or 1), zero_stage=int(self.layout[ZERO_STAGE] or 0))


def facts_of(config: TrainerConfig, prepared: Prepared, ranks: int) -> Facts:
    """The facts of this job."""
    training, resolved = config.training, prepared.resolved
    lora = config.lora.to_wire() if config.lora is not None and config.tuning == "LoRA" else {}
    shape: dict[str, Scalar] = {
        "model digest": prepared.model_digest,
        "model adapters": ", ".join(adapter.digest for adapter in prepared.adapters) or None,
        "data digest": prepared.data_digest,
        "data.train[].weight": _weights(config),
        "stage": config.stage,
        "algorithm": config.algorithm,
        "reference digest": prepared.reference_digest,
        "reference adapters": ", ".join(adapter.digest for adapter in prepared.reference_adapters) or None,
        **_critic(config, prepared),
        "tuning": config.tuning,
        "lora": str(sorted(lora.items())) if lora else None,
        "training.batchSize": training.batch_size,
        "training.seed": training.seed,
        "training.precision": resolved.precision,
    }
    layout: dict[str, Scalar] = {
        WORLD_SIZE: ranks,
        ZERO_STAGE: resolved.zero_stage,
        OVERRIDES: str(sorted(config.deepspeed.overrides.items())) if config.deepspeed.overrides else None,
    }
    course: dict[str, Scalar] = {
        "training.learningRate": training.learning_rate,
        "training.schedule": training.schedule,
        "training.minLearningRateRatio": training.min_learning_rate_ratio,
        "warm-up steps": resolved.warmup_steps,
        "total steps": resolved.total_steps,
        "training.weightDecay": training.weight_decay,
        "training.betas": f"{training.beta1}, {training.beta2}",
        "training.epsilon": training.epsilon,
        "training.maxGradNorm": training.max_grad_norm,
        **_objective(config),
    }
    return Facts(shape, layout, course)


def _critic(config: TrainerConfig, prepared: Prepared) -> dict[str, Scalar]:
    """PPO's critic: which model it began as, and whether it is on the policy's base."""
    if config.stage != "RL" or config.algorithm != "PPO":
        return {}
    critic = config.critic or CriticConfig()
    return {
        "critic digest": prepared.critic_digest,
        "critic adapters": ", ".join(adapter.digest for adapter in prepared.critic_adapters) or None,
        "critic.shared": str(critic.shared),
    }


def _weights(config: TrainerConfig) -> str | None:
    """They say which row stands at which position; None where each row comes once an epoch."""
    weights = [source.weight for source in config.data.train]
    return ", ".join(f"{weight:g}" for weight in weights) if set(weights) != {1.0} else None


def _objective(config: TrainerConfig) -> dict[str, Scalar]:
    """What the stage's loss has of its own."""
    if config.stage == "Preference":
        settings = config.preference.to_wire()
        return {f"preference.{name}": value for name, value in settings.items()}
    if config.stage == "RL":
        return _online(config)
    return {"rewardModel.centering": config.reward_model.centering} if config.stage == "RewardModel" else {}


def _online(config: TrainerConfig) -> dict[str, Scalar]:
    """Rollouts, rewards and what the algorithm has of its own."""
    algorithm = config.algorithm or ""
    named = {"rollout": config.rollout, algorithm.lower(): getattr(config, algorithm.lower())}
    found: dict[str, Scalar] = {"rewards": canonical_json([reward.to_wire() for reward in config.rewards])}
    for part, settings in named.items():
        # Of settings that are objects themselves, as text.
        found |= {f"{part}.{name}": canonical_json(value) for name, value in settings.to_wire().items()}
    if config.algorithm == "PPO":
        critic = config.critic or CriticConfig()
        found |= {"critic.learningRate": critic.learning_rate, "critic.warmupSteps": critic.warmup_steps}
    return found


def differences(checkpoint: Facts, job: Facts, own: bool) -> list[str]:
    """Each difference with both values; `own`: the checkpoint is of this very job, whose course cannot have changed."""
    found = []
    for field in fields(Facts)[: 3 if own else 1]:
        theirs, ours = getattr(checkpoint, field.name), getattr(job, field.name)
        names = sorted(set(theirs) | set(ours))
        found += [
            f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
            for name in names
            if _unlike(theirs, ours, name)
        ]
    return found


def _unlike(theirs: dict[str, Scalar], ours: dict[str, Scalar], name: str) -> bool:
    return theirs.get(name) != ours.get(name)
