"""What stage RL's fields need of each other: algorithm and block, lengths, batches, the reference, the critic.

Where a rule reads a field that is left out, it takes the built-in default; plan/defaults has the same numbers.
"""

from __future__ import annotations

from typing import Any

from posttrain_api.rules.types import Rule, cel_has, excludes, get, has, needs, positive, whole

ONLINE = ("GRPO", "PPO", "RLOO")
MAX_NEW_TOKENS = 512
CLIP_HIGH = 0.2
BATCH_SIZE = 32
"""Prompts per optimizer step of stage RL."""


def _algorithm(spec: Any) -> Any:
    return "GRPO" if get(spec, "algorithm") is None else get(spec, "algorithm")


def _of_algorithm(name: str, field: str) -> Rule:
    """A block that only one algorithm reads."""
    said = f"(has(self.algorithm) && self.algorithm == '{name}')"
    default = "!has(self.algorithm) || " if name == "GRPO" else ""
    return excludes(
        "spec",
        f".{field}",
        f"self.stage == 'RL' && has(self.{field}) && !({default}{said})",
        lambda spec: get(spec, "stage") == "RL" and has(spec, field) and _algorithm(spec) != name,
        (f"is for algorithm {name} only", f"remove it, or write algorithm: {name}"),
    )


def _algorithm_fits(spec: Any) -> bool:
    stage, named = get(spec, "stage"), get(spec, "algorithm")
    return named is None or stage not in ("Preference", "RL") or (stage == "RL") == (named in ONLINE)


_IS_ONLINE = "self.algorithm in ['GRPO', 'PPO', 'RLOO']"
_NEW_TOKENS = f"({cel_has('rollout.maxNewTokens')} ? self.rollout.maxNewTokens : {MAX_NEW_TOKENS})"
_PROMPT = "(has(self.data.maxPromptLength) ? self.data.maxPromptLength : 1)"
_BATCH = f"({cel_has('training.batchSize')} ? self.training.batchSize : {BATCH_SIZE})"


def _answer_fits(spec: Any) -> bool:
    longest, prompt = whole(spec, "data.maxLength", 0), whole(spec, "data.maxPromptLength", 1)
    answer = whole(spec, "rollout.maxNewTokens", MAX_NEW_TOKENS)
    if get(spec, "stage") != "RL" or not longest or not prompt or not answer:
        return True
    return prompt + answer <= longest


def _batches_fit(spec: Any) -> bool:
    rollout, step = whole(spec, "rollout.batchSize", 0), whole(spec, "training.batchSize", BATCH_SIZE)
    return not rollout or not step or step < 1 or rollout % step == 0


def _buffer_fits(spec: Any) -> bool:
    buffer = whole(spec, "grpo.overlongPenalty.bufferTokens", 0)
    answer = whole(spec, "rollout.maxNewTokens", MAX_NEW_TOKENS)
    return not buffer or not answer or buffer <= answer


def _dual_fits(grpo: Any) -> bool:
    dual = get(grpo, "dualClip")
    high = get(grpo, "clipHigh") if has(grpo, "clipHigh") else CLIP_HIGH
    return not (_number(dual) and _number(high)) or dual > 1 + high


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _no_kl(spec: Any) -> bool:
    """Whether stage RL has a reference that nothing is compared with."""
    if get(spec, "stage") != "RL" or not has(spec, "reference"):
        return False
    fields = {"PPO": ("ppo.klCoefficient", True), "RLOO": ("rloo.klCoefficient", True), "GRPO": ("grpo.beta", False)}
    field, default = fields.get(str(_algorithm(spec)), ("", True))
    return not positive(spec, field, default)


def _cel_kl() -> str:
    """CEL: the algorithm has a KL term. GRPO's is off unless said, the others' on."""
    grpo = f"({cel_has('grpo.beta')} && self.grpo.beta > 0.0)"
    ppo, rloo = (
        f"(!({cel_has(f'{name}.klCoefficient')}) || self.{name}.klCoefficient > 0.0)" for name in ("ppo", "rloo")
    )
    return (
        f"(!has(self.algorithm) || self.algorithm == 'GRPO' ? {grpo} : "
        f"self.algorithm == 'PPO' ? {ppo} : self.algorithm != 'RLOO' || {rloo})"
    )


def _model_rewards(spec: Any) -> int:
    rewards = get(spec, "rewards")
    return sum(has(reward, "model") for reward in rewards) if isinstance(rewards, list) else 0


ONLINE_RULES: tuple[Rule, ...] = (
    needs(
        "spec",
        ".algorithm",
        f"!has(self.algorithm) || !(self.stage in ['Preference', 'RL']) || (self.stage == 'RL') == ({_IS_ONLINE})",
        _algorithm_fits,
        (
            "must be one of its stage",
            "RL: GRPO, PPO or RLOO; Preference: DPO, IPO, Hinge, RobustDPO, APOZero, APODown or SimPO",
        ),
    ),
    needs(
        "spec",
        ".rewards",
        "self.stage != 'RL' || has(self.rewards)",
        lambda spec: get(spec, "stage") != "RL" or has(spec, "rewards"),
        ("is required in stage RL", "write what is rewarded, e.g. rewards: [{math: {column: answer}}]"),
    ),
    _of_algorithm("GRPO", "grpo"),
    _of_algorithm("PPO", "ppo"),
    _of_algorithm("RLOO", "rloo"),
    _of_algorithm("PPO", "critic"),
    excludes(
        "spec",
        ".reference",
        f"self.stage == 'RL' && has(self.reference) && !{_cel_kl()}",
        _no_kl,
        (
            "means nothing without a KL term",
            "remove it, or give grpo.beta (ppo.klCoefficient, rloo.klCoefficient) more than 0",
        ),
    ),
    needs(
        "spec",
        ".data.maxLength",
        f"self.stage != 'RL' || !has(self.data.maxLength) || {_PROMPT} + {_NEW_TOKENS} <= self.data.maxLength",
        _answer_fits,
        (
            f"must hold maxPromptLength and rollout.maxNewTokens ({MAX_NEW_TOKENS} unless said) together",
            "choose more, or less for those; without it, it is their sum",
        ),
    ),
    needs(
        "spec",
        ".rollout.batchSize",
        f"!({cel_has('rollout.batchSize')}) || self.rollout.batchSize % {_BATCH} == 0",
        _batches_fit,
        (
            f"must be a multiple of training.batchSize ({BATCH_SIZE} unless said)",
            "choose a multiple: a rollout is used up by whole optimizer steps",
        ),
    ),
    needs(
        "spec",
        ".evaluation.metric",
        f"self.stage != 'RL' || !({cel_has('evaluation.metric')}) || self.evaluation.metric != 'eval_loss'",
        lambda spec: get(spec, "stage") != "RL" or get(spec, "evaluation.metric") != "eval_loss",
        ("is not measured in stage RL", "write eval_reward, or leave it out"),
    ),
)

GRPO_RULES: tuple[Rule, ...] = (
    needs(
        "spec.grpo",
        ".importanceLevel",
        "!has(self.importanceLevel) || self.importanceLevel != 'Sequence' || "
        "(has(self.lossAggregation) && self.lossAggregation == 'Sequence')",
        lambda grpo: get(grpo, "importanceLevel") != "Sequence" or get(grpo, "lossAggregation") == "Sequence",
        ("Sequence needs lossAggregation: Sequence", "write both (GSPO), or leave importanceLevel out"),
    ),
    *(
        excludes(
            "spec.grpo",
            f".{name}",
            f"has(self.{name}) && has(self.scaleRewards) && self.scaleRewards == 'None'",
            lambda grpo, name=name: has(grpo, name) and get(grpo, "scaleRewards") == "None",  # type: ignore[misc]
            ("means nothing with scaleRewards: None", "remove it: the advantage is divided by nothing"),
        )
        for name in ("stdDdof", "stdEpsilon")
    ),
    needs(
        "spec.grpo",
        ".dualClip",
        f"!has(self.dualClip) || self.dualClip > 1.0 + (has(self.clipHigh) ? self.clipHigh : {CLIP_HIGH})",
        _dual_fits,
        (f"must be more than 1 + clipHigh ({CLIP_HIGH} unless said)", "choose more, e.g. 3, or a smaller clipHigh"),
    ),
    needs(
        "spec",
        ".grpo.overlongPenalty.bufferTokens",
        f"!({cel_has('grpo.overlongPenalty')}) || self.grpo.overlongPenalty.bufferTokens <= {_NEW_TOKENS}",
        _buffer_fits,
        (f"must not be more than rollout.maxNewTokens ({MAX_NEW_TOKENS} unless said)", "choose less"),
    ),
)

PPO_RULES: tuple[Rule, ...] = (
    excludes(
        "spec.ppo",
        ".adaptiveKL",
        "has(self.adaptiveKL) && has(self.klCoefficient) && self.klCoefficient <= 0.0",
        lambda ppo: has(ppo, "adaptiveKL") and not positive(ppo, "klCoefficient", True),
        ("has nothing to move where klCoefficient is 0", "remove it, or give klCoefficient a value to begin with"),
    ),
    excludes(
        "spec.critic",
        ".initFrom",
        "has(self.initFrom) && has(self.model)",
        lambda critic: has(critic, "initFrom") and has(critic, "model"),
        ("excludes model", "keep the one that the critic begins as"),
    ),
    needs(
        "spec",
        ".critic.initFrom",
        f"!({cel_has('critic.initFrom')}) || self.critic.initFrom != 'RewardModel' || "
        "(has(self.rewards) && self.rewards.exists_one(reward, has(reward.model)))",
        lambda spec: get(spec, "critic.initFrom") != "RewardModel" or _model_rewards(spec) == 1,
        (
            "RewardModel needs exactly one reward of kind model",
            "name the model that is meant in critic.model, or write Policy",
        ),
    ),
)
