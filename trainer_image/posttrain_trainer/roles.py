"""The roles that learn: the policy, and PPO's critic beside it, on an engine of its own or on the policy's.

Made by assemble, driven by the loop as `engine.Trained`. Own engines (plan B): two models, two optimizers, one process
group. A shared engine (plan A): one frozen base with an adapter for each, one optimizer whose groups say whose they
are, one step for both, clipped by the norm of both together. Whatever is not PPO has one engine and needs none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain_trainer.checkpoint_write import Saved
from posttrain_trainer.engine import Engine, StepInfo, Trained
from posttrain_trainer.engine_adopt import Written
from posttrain_trainer.engine_config import EngineSettings
from posttrain_trainer.grad_norms import ROLE
from posttrain_trainer.lora import POLICY
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.optimizers import MakeOptimizer, parameter_groups
from posttrain_trainer.value_model import CRITIC, SharedModel

CRITIC_TAG = "ds-critic"
"""Folder of the critic's engine inside a checkpoint."""


class SharedEngine(Engine):
    """Two roles on one engine. It is the policy itself, as every other policy's engine is; `critic` is the other."""

    def __init__(self, model: SharedModel, optimizer: torch.optim.Optimizer, settings: EngineSettings) -> None:
        """Needs the default process group. Groups of `optimizer`: `shared_groups(model)`."""
        super().__init__(model, optimizer, settings)
        self._model = model
        self._due: dict[str, float] = {}
        self._taught: set[str] = set()
        self._now = POLICY
        optimizer.register_step_post_hook(self._after_step)

    @property
    def shared(self) -> bool:
        """With the critic."""
        return True

    @property
    def critic(self) -> SharedCritic:
        """The critic's half."""
        return SharedCritic(self)

    def scope(self) -> AbstractContextManager[None]:
        """The policy's adapter."""
        return self.scope_of(POLICY)

    def scope_of(self, role: str) -> AbstractContextManager[None]:
        """Inside it forward and backward are this role's."""
        return self._model.scope(role)

    def backward(self, loss: Tensor) -> None:
        """As Engine.backward, inside the scope of the role whose loss it is."""
        self._taught.add(self._model.role)
        super().backward(loss)

    def set_learning_rate(self, rate: float, role: str | None = None) -> None:
        """The policy's, unless another role is named."""
        super().set_learning_rate(rate, role or POLICY)

    def step(self) -> StepInfo:
        """The policy's part of a step."""
        return self.step_of(POLICY)

    def step_of(self, role: str) -> StepInfo:
        """The first role that asks makes the step, for both; the other gets what it was. A role without a backward
        since the last step stays as it is, its Adam's count of steps too."""
        if role not in self._due:
            self._due = dict(super().step().by_role)
            self._taught.clear()
        return StepInfo(self._due.pop(role))

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # ZeRO steps every group, with zeros for what has no gradient. Zeros move nothing before a first gradient has
        # come, but Adam would count them, and then correct its bias too little.
        for group in optimizer.param_groups:
            for parameter in group["params"] if group[ROLE] not in self._taught else ():
                count = optimizer.state[parameter].get("step")
                if count is not None:
                    count -= 1


@dataclass(frozen=True)
class SharedCritic:
    """The critic's half of a shared engine."""

    engine: SharedEngine

    @property
    def module(self) -> nn.Module:
        """The shared model."""
        return self.engine.module

    @property
    def shared(self) -> bool:
        """With the policy."""
        return True

    def scope(self) -> AbstractContextManager[None]:
        """The critic's adapter and head."""
        return self.engine.scope_of(CRITIC)

    def forward(self, micro: MicroBatch) -> Tensor:
        """Values [n] fp32."""
        values: Tensor = self.engine.forward(micro)
        return values

    def backward(self, loss: Tensor) -> None:
        """As Engine.backward."""
        self.engine.backward(loss)

    def set_learning_rate(self, rate: float) -> None:
        """The critic's own."""
        self.engine.set_learning_rate(rate, CRITIC)

    def step(self) -> StepInfo:
        """The critic's part of a step."""
        return self.engine.step_of(CRITIC)

    def train(self, mode: bool = True) -> None:
        """Of the whole model."""
        self.engine.train(mode)


@dataclass(frozen=True)
class Together:
    """Engines that are saved into one checkpoint, each into its own folder."""

    engines: Sequence[Engine]

    def save(self, folder: Path) -> None:
        """One after the other; all ranks call it."""
        for engine in self.engines:
            engine.save(folder)

    def load(self, folder: Path) -> None:
        """What `save` wrote."""
        for engine in self.engines:
            engine.load(folder)

    def adopt(self, folder: Path, written: Written) -> None:
        """What `save` wrote on other ranks."""
        for engine in self.engines:
            engine.adopt(folder, written)


def saved_of(engine: Engine, critic: Trained | None) -> Saved:
    """What a checkpoint holds: the policy's engine, with the critic on it where it is; and the critic's own."""
    return Together((engine, critic)) if isinstance(critic, Engine) else engine


def shared_groups(model: SharedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups as `parameter_groups` makes them, for each role, with its name."""
    return [
        {**group, ROLE: role}
        for role, parameters in model.by_role().items()
        for group in parameter_groups(nn.ParameterList(parameters), weight_decay)
    ]


def policy_engine(
    module: nn.Module, make_optimizer: MakeOptimizer, settings: EngineSettings, weight_decay: float
) -> Engine:
    """The policy's engine, PPO's critic on it where `module` has one. Needs the default process group."""
    if isinstance(module, SharedModel):
        return SharedEngine(module, make_optimizer(shared_groups(module, weight_decay)), settings)
    return Engine(module, make_optimizer(parameter_groups(module, weight_decay)), settings)


def critic_engine(
    module: nn.Module, make_optimizer: MakeOptimizer, settings: EngineSettings, weight_decay: float
) -> Engine:
    """A critic's own engine, clipped by its own norm. `settings`: the policy's."""
    optimizer = make_optimizer(parameter_groups(module, weight_decay))
    return Engine(module, optimizer, replace(settings, tag=CRITIC_TAG))
