"""The parts of stage RL: rollouts, rewards, the models that are asked, the critic, and the evaluation.

Called by assemble, which makes everything that other stages have too. Makes and hands over; does nothing with what it
made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import algorithms
from posttrain_trainer.advantages import adapted
from posttrain_trainer.batching import Share
from posttrain_trainer.drawing import Drawer
from posttrain_trainer.engine import Engine, FrozenEngine, Trained
from posttrain_trainer.groups import Groups
from posttrain_trainer.job import Job
from posttrain_trainer.learner import Learner
from posttrain_trainer.loading import ModelFolder
from posttrain_trainer.metrics import Metrics
from posttrain_trainer.online import Collector, Models, Pace, Show
from posttrain_trainer.online_eval import OnlineEvaluator
from posttrain_trainer.packing import packs
from posttrain_trainer.prompts import PromptSet
from posttrain_trainer.reference_models import Untrained, said
from posttrain_trainer.rewards.model import RewardModel, reward_module
from posttrain_trainer.rewards.reward_set import RewardSet
from posttrain_trainer.rollout.base import Sampling
from posttrain_trainer.rollout.choose import rollout_of
from posttrain_trainer.token_scores import Score, TokenScores


@dataclass(frozen=True)
class Online:
    """What assemble has made already. reference: log p of each token, where the algorithm wants it; critic: its
    engine, PPO's only; show: takes the samples that are shown."""

    job: Job
    engine: Engine
    part: Share
    reference: Callable[[], Score]
    critic: Trained | None
    show: Show | None

    def parts(self) -> dict[str, Any]:
        """Of `Parts`, by name."""
        collector, critic = self.collector(), self.job.config.critic
        return {
            "feed": collector,
            "evaluator": self.evaluator(collector),
            "critic": self.learner(),
            "policy_idle_steps": 0 if critic is None else critic.warmup_steps,
        }

    def collector(self) -> Collector:
        """The source of steps."""
        config = self.job.config
        algorithm = algorithms.online_of(config)
        models = Models(
            policy=Untrained(self.engine).logp,
            reference=self.reference() if algorithm.needs_reference else None,
            value=None if self.critic is None else partial(said, self.critic),
        )
        prompts = PromptSet(Path(self.job.prepared.train_dir))
        refills = config.grpo.max_refills if config.algorithm == "GRPO" else 0
        groups = Groups(self._drawer(prompts), self.job.sampler(prompts.sources), algorithm.group_size, refills)
        scores = TokenScores(self.part, self.job.runtime)
        return Collector(groups, algorithm, models, scores, _pace(config), self.show)

    def evaluator(self, collector: Collector) -> OnlineEvaluator | None:
        """None where there is no held-out set. It has the collector's rewards: their processes run once."""
        folder = self.job.prepared.eval_dir
        if folder is None:
            return None
        config, drawer = self.job.config, collector.groups.drawer
        held_out = replace(drawer, prompts=PromptSet(Path(folder)))
        return OnlineEvaluator(held_out, config.rollout.batch_size * collector.groups.group_size)

    def learner(self) -> Learner | None:
        """The critic, beside the policy."""
        config = self.job.config
        algorithm = algorithms.critic_of(config)
        if self.critic is None or algorithm is None or config.critic is None:
            return None
        return Learner("critic", self.critic, algorithm, config.critic.learning_rate / config.training.learning_rate)

    def _drawer(self, prompts: PromptSet) -> Drawer:
        config, prepared, runtime = self.job.config, self.job.prepared, self.job.runtime
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(prepared.tokenizer_dir, local_files_only=True)
        rollout, local_ranks = config.rollout, config.topology.processes_per_node
        return Drawer(
            prompts=prompts,
            rollout=rollout_of(rollout.engine, self.engine, runtime.control),
            rewards=RewardSet(config.rewards, runtime.control.gather, self._reward_models(), local_ranks),
            sampling=Sampling(
                max_new_tokens=rollout.max_new_tokens,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
                stops=prepared.stop_tokens,
            ),
            decode=lambda tokens: str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True)),
            seed=config.training.seed,
            runtime=runtime,
        )

    def _reward_models(self) -> dict[str, RewardModel]:
        """By the reward's name. One that two rewards name is there twice."""
        prepared, runtime = self.job.prepared, self.job.runtime
        found = {}
        for name, model in prepared.reward_models.items():
            folder = ModelFolder(
                Path(model.dir), tuple(Path(each.dir) for each in model.adapters), prepared.resolved.attention.lower()
            )
            module = reward_module(name, folder, Path(prepared.tokenizer_dir))
            packed = packs(module, prepared.resolved.attention, runtime.device)
            part = Share(runtime.rank, runtime.ranks, self.part.budget, whole=True, packed=packed)
            engine = FrozenEngine(module, self.engine.settings)
            found[name] = RewardModel(engine, runtime.control, part, runtime.device)
        return found


def _pace(config: TrainerConfig) -> Pace:
    first = config.ppo.kl_coefficient if config.algorithm == "PPO" else config.rloo.kl_coefficient
    adaptive = config.ppo.adaptive_kl if config.algorithm == "PPO" else None

    def next_kl(coefficient: float, metrics: Metrics, samples: int) -> float:
        return coefficient if adaptive is None else adapted(coefficient, metrics["objective/kl"], samples, adaptive)

    return Pace(config.training.batch_size, config.training.seed, first, next_kl)
