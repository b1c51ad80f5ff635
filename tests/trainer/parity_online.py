"""The online algorithms beside TRL's GRPOTrainer and RLOOTrainer: one rollout that was made by hand, and both sides'
advantages, loss, gradients and metrics.

TRL's side is its own code from the sampled tokens on: masks, log-probabilities, baseline, loss. Only its sampling and
its call of reward functions are replaced, by what the rollout says. Ours is an Experience, the algorithm's estimate,
micro-batches cut from it, the scorer, and the arithmetic of the loop.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import parity_kit as kit
import torch
from numpy.typing import NDArray
from parity_kit import EOS, WORDS, Side
from parity_trl import arguments, side

from posttrain_trainer.experience import OLD, REFERENCE, ROLLOUT, Experience
from posttrain_trainer.microbatch import MicroBatch, collate
from posttrain_trainer.scorer import Scorer

GROUPS, SIZE, MOST = 4, 4, 10
"""Prompts, completions of each, and maxNewTokens."""
CUT = 3
"""Samples of a micro-batch: no multiple of a group, and the last one is smaller."""


@dataclass(frozen=True)
class Rollout:
    """Token ids; `difference`: by how much the engine's log-probabilities are off, of each token."""

    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: NDArray[np.float64]
    difference: list[list[float]]


def rollout(seed: int = 0) -> Rollout:
    """16 samples of two rewards. Group 1 has equal rewards, group 2 one sample that nobody scored, group 3 one that
    was; some completions end by EOS, one is nothing else, and the others are cut off, mostly at the limit."""
    random_ = random.Random(seed)

    def words(count: int) -> list[int]:
        return [random_.randrange(2, WORDS) for _ in range(count)]

    prompts = [words(random_.randint(1, 5)) for _ in range(GROUPS)]
    completions = [words(MOST) if i % 4 == 0 else [*words(random_.randint(0, MOST - 1)), EOS] for i in range(16)]
    completions[1], completions[6] = [EOS], words(4)
    rewards = np.array([[random_.random(), random_.gauss(0, 2)] for _ in range(16)])
    rewards[4:8], rewards[9], rewards[10, 1] = [0.5, -1.0], np.nan, np.nan
    rewards[12:15] = np.nan
    difference = [[random_.gauss(0, 0.8) for _ in tokens] for tokens in completions]
    return Rollout([prompts[i // SIZE] for i in range(16)], completions, rewards, difference)


@dataclass(frozen=True)
class Models:
    """Of one shape: what sampled, what learns, and what is held to."""

    old: Any
    policy: Any
    reference: Any


def models(head: float = 1.0) -> Models:
    """The policy is a few steps from the old one, with ratios between ⅓ and 3, the reference some more. head: what the
    head's weight is multiplied by: small logits have small rounding errors."""
    return Models(_moved(0.0, head), _moved(0.01, head), _moved(0.02, head))


def _moved(by: float, head: float) -> Any:
    model = kit.language_model(0)
    torch.manual_seed(int(1000 * by))
    with torch.no_grad():
        for each in model.parameters():
            each.add_(by * torch.randn_like(each))
        model.lm_head.weight.mul_(head)
    return model


def experience(given: Rollout, by: Models, temperature: float = 1.0) -> Experience:
    """With the log-probabilities of old policy and reference by our scorer."""
    found = Experience(
        prompts=tuple(np.array(tokens, dtype=np.int32) for tokens in given.prompts),
        completions=tuple(np.array(tokens, dtype=np.int32) for tokens in given.completions),
        ended=np.array([tokens[-1] == EOS for tokens in given.completions]),
        group=np.arange(16) // SIZE,
        rewards=given.rewards,
        weights=(0.75, 1.25),
    )
    micro = collate([found[row] for row in range(len(found))])
    old, reference = (_logp(model, micro, temperature) for model in (by.old, by.reference))
    sampled = old - np.concatenate([np.array(each, dtype=np.float32) for each in given.difference])
    return found.having(**{OLD: old, REFERENCE: reference, ROLLOUT: sampled})


def _logp(model: Any, micro: MicroBatch, temperature: float) -> NDArray[np.float32]:
    scorer = Scorer(copy.deepcopy(model), temperature)
    with torch.no_grad():
        logp, _, _ = scorer(*scorer.inputs(micro))
    found: NDArray[np.float32] = logp.numpy()
    return found


def ours(algorithm: Any, found: Experience, by: Models, temperature: float = 1.0) -> Side:
    """A step up to its gradients; the estimate's metrics are among the others."""
    estimated = algorithm.estimate(found, 0.0)
    side_ = kit.ours(algorithm, Scorer(copy.deepcopy(by.policy), temperature), micros(found, estimated.each))
    return replace(side_, metrics={**side_.metrics, **estimated.metrics})


def micros(found: Experience, each: Any) -> list[MicroBatch]:
    table = found.having(**each)
    return [collate([table[row] for row in range(len(table))[begin : begin + CUT]]) for begin in range(0, 16, CUT)]


def without_old(found: Experience) -> Experience:
    """As of a step with one update, where the old policy is the one that learns."""
    return replace(found, each={name: flat for name, flat in found.each.items() if name != OLD})


def grpo(by: Models, folder: Path, temperature: float = 1.0) -> Any:
    """A GRPOTrainer that has everything but vLLM."""
    from trl import GRPOConfig, GRPOTrainer

    given = {"num_generations": SIZE, "max_completion_length": MOST, "num_iterations": 2, "temperature": temperature}
    args = GRPOConfig(**arguments(folder, per_device_train_batch_size=16, use_bias_correction_kl=False, **given))
    return _trainer(GRPOTrainer, args, by, temperature)


def rloo(by: Models, folder: Path, temperature: float = 1.0) -> Any:
    """An RLOOTrainer that adds up log-probabilities in fp64. In fp32 its difference of two sums is off by 7e-6, their
    own rounding; ours is a sum of differences."""
    from trl import RLOOConfig, RLOOTrainer

    given = {"num_generations": SIZE, "max_completion_length": MOST, "temperature": temperature, "beta": 0.0}
    args = RLOOConfig(**arguments(folder, per_device_train_batch_size=16, **given))
    trainer = _trainer(RLOOTrainer, args, by, temperature)
    inner = trainer._get_per_token_logps_and_entropies

    def exact(*given: Any, **named: Any) -> tuple[Any, ...]:
        logp, *others = inner(*given, **named)
        return (logp.double(), *others)

    trainer._get_per_token_logps_and_entropies = exact
    return trainer


def _trainer(kind: Any, args: Any, by: Models, temperature: float) -> Any:
    from trl.trainer.utils import add_fused_lm_head

    data = datasets.Dataset.from_list([{"prompt": " w05"}] * GROUPS)
    words = kit.tokenizer()
    rewards = [_no_reward, _no_reward]
    trainer = kind(copy.deepcopy(by.policy), rewards, args=args, train_dataset=data, processing_class=words)
    trainer.ref_model = copy.deepcopy(by.reference)
    add_fused_lm_head(trainer.ref_model, temperature=temperature)
    trainer.reward_weights = torch.tensor([0.75, 1.25])
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _no_reward(**_: Any) -> list[float]:
    raise AssertionError("the rollout has its rewards")


@dataclass(frozen=True)
class Theirs:
    """What TRL makes of a rollout: the inputs of its loss, and the loss."""

    inputs: dict[str, Any]
    side: Side


def theirs(trainer: Any, given: Rollout, by: Models, *, old: bool = True) -> Theirs:
    """Its own scoring by the old policy, then its own loss of the new one. old: whether the loss sees what the old one
    said, as it does in every pass but a single one."""
    trainer._metrics["train"].clear()
    trainer._generate = lambda prompts: _sampled(trainer, given)
    trainer._calculate_rewards = lambda *_: torch.tensor(given.rewards, dtype=torch.float32)
    trainer.model.train()
    trainer.model.load_state_dict(by.old.state_dict())
    inputs = trainer._generate_and_score_completions([{"prompt": kit.text(each)} for each in given.prompts])
    trainer.model.load_state_dict(by.policy.state_dict())
    if not old:
        inputs = {name: each for name, each in inputs.items() if name != "old_per_token_logps"}
    return Theirs(inputs, side(trainer, lambda: trainer._compute_loss(trainer.model, dict(inputs))))


def _sampled(trainer: Any, given: Rollout) -> tuple[Any, ...]:
    texts = [kit.text(tokens) for tokens in given.completions]
    if "RLOO" in type(trainer).__name__:
        return given.prompts, given.completions, texts
    sampled = _engines(trainer, given) if trainer.use_vllm else None
    return given.prompts, given.completions, None, texts, sampled, {}, None, None


def _engines(trainer: Any, given: Rollout) -> list[list[float]]:
    """What the engine says of each token: the old policy's log-probability, off by the difference."""
    scorer = Scorer(copy.deepcopy(kit.language_model(0)), trainer.temperature)
    rows = [kit.TrainingRow((kit.example(p, c),), {}) for p, c in zip(given.prompts, given.completions, strict=True)]
    micro = collate(rows)
    with torch.no_grad():
        logp, _, _ = scorer(*scorer.inputs(micro))
    parts = torch.split(logp, [len(tokens) for tokens in given.completions])
    pairs = zip(parts, given.difference, strict=True)
    return [(part - torch.tensor(off)).tolist() for part, off in pairs]


def by_token(advantages: Sequence[float], found: Experience) -> NDArray[np.float32]:
    return found.spread(np.array(advantages))
