"""What forked ranks run in the tests of PPO's roles: engines driven as the loop drives them, many cases in one process
group."""

from __future__ import annotations

import gc
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from posttrain_api.trainer import TrainerConfig
from posttrain_trainer import engine as engine_module
from posttrain_trainer import runtime as runtime_module
from posttrain_trainer.checkpoint import Checkpoints
from posttrain_trainer.checkpoint_choice import Place
from posttrain_trainer.checkpoint_facts import facts_of
from posttrain_trainer.checkpoint_write import Content
from posttrain_trainer.critic_model import build_critic, build_policy
from posttrain_trainer.engine import Engine, Trained
from posttrain_trainer.engine_adopt import Written
from posttrain_trainer.engine_config import EngineSettings
from posttrain_trainer.export import Finished, export
from posttrain_trainer.fence import Fence
from posttrain_trainer.microbatch import MicroBatch, collate
from posttrain_trainer.optimizers import AdamSettings, adamw
from posttrain_trainer.prepared import Prepared, read_manifest
from posttrain_trainer.randomness import random_state
from posttrain_trainer.reference_models import AdapterOff, said
from posttrain_trainer.roles import SharedEngine, critic_engine, policy_engine, saved_of
from posttrain_trainer.runtime import Runtime
from posttrain_trainer.state import OnlineState, State
from posttrain_trainer.tokenset import TokenSet, TrainingRow

UPDATES, RATES = 3, (0.05, 0.02)
"""Of the policy and of the critic."""
SAVED = State(step=2, online=OnlineState(cursor=12, kl_coefficient=0.07))


@dataclass(frozen=True)
class Case:
    """How two roles are trained. clip 0: not; idle: updates in which only the critic learns; resume: after two updates
    everything is made anew from a checkpoint; adopt: whose state is taken over by name."""

    plan: str
    zero: int = 0
    tuning: str = "LoRA"
    checkpointing: bool = False
    clip: float = 0.0
    idle: int = 0
    adam: bool = False
    resume: bool = False
    adopt: bool = False
    export: bool = False


@dataclass(frozen=True)
class Roles:
    """Both, and how they were made."""

    engine: Engine
    policy: Trained
    critic: Trained

    def both(self) -> dict[str, Trained]:
        """By name."""
        return {"policy": self.policy, "critic": self.critic}


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Adam would hide a wrong scale of the loss."""
    return torch.optim.SGD([{**group, "weight_decay": 0.0} for group in groups], lr=0.0)


@dataclass(frozen=True)
class Job:
    """A case on this rank."""

    case: Case
    folder: Path
    config: TrainerConfig
    prepared: Prepared
    runtime: Runtime

    def roles(self) -> Roles:
        """New engines."""
        case = self.case
        settings = EngineSettings(case.zero, case.clip, adapter=case.tuning == "LoRA")
        make = adamw(AdamSettings(0.9, 0.9, 1e-3)) if case.adam else sgd
        engine = policy_engine(_moved(build_policy(self.config, self.prepared)).train(), make, settings, 0.1)
        if isinstance(engine, SharedEngine):
            return Roles(engine, engine, engine.critic)
        critic = _moved(build_critic(self.config, self.prepared)).train()
        return Roles(engine, engine, critic_engine(critic, make, settings, 0.1))

    def checkpoints(self) -> Checkpoints:
        """Of this run."""
        place = Place(self.folder, "pvc://run", keep=2, resume=True)
        facts = facts_of(self.config, self.prepared, self.runtime.ranks)
        return Checkpoints(place, self.runtime, facts, Fence(self.folder, 1))

    def again(self, roles: Roles) -> Roles:
        """Saved, and made anew from what was saved."""
        self.checkpoints().save(Content(saved_of(roles.engine, roles.critic), SAVED, random_state()))
        new = self.roles()
        if self.case.adopt:
            checkpoints = self.folder / "checkpoints" / "step-000002"
            written = Written(self.runtime.ranks, self.case.zero)
            saved_of(new.engine, new.critic).adopt(checkpoints, written)
            return new
        assert self.checkpoints().resume(saved_of(new.engine, new.critic)) == SAVED
        return new

    def export(self, roles: Roles) -> None:
        """As the worker does."""
        weights = roles.engine.weights()
        if self.runtime.first:
            assert weights is not None
            finished = Finished(roles.engine.module, weights, UPDATES, self.checkpoints().fence)
            export(self.config, self.prepared, finished)


def job_of(folder: Path, runtime: Runtime | None = None) -> Job:
    """What `test_roles` has written there. `runtime`: the one that the group has already."""
    config = TrainerConfig.model_validate_json((folder / "config.json").read_text())
    case = Case(**json.loads((folder / "case.json").read_text()))
    prepared = read_manifest(folder / "prepared")
    assert prepared is not None
    runtime = runtime or runtime_module.start(config.topology, config.training.seed)
    return Job(case, folder, config, prepared, runtime)


def train_roles(run_dir: str, names: Sequence[str]) -> None:
    """Each case in one process group; rank 0 keeps what was found."""
    engine_module.PERSISTENCE_THRESHOLD = 0
    runtime = None
    for name in names:
        job = job_of(Path(run_dir) / name, runtime)
        runtime = job.runtime
        found = _train(job)
        if runtime.first:
            torch.save(found, job.folder / "found.pt")
        gc.collect()
    assert runtime is not None
    runtime.control.barrier()


@torch.no_grad()
def _moved(module: nn.Module) -> nn.Module:
    """Adapters and head away from zero, by their names alone, so that everything has a gradient from the start."""
    for name, parameter in module.named_parameters():
        if "lora_B" in name or name == "head.weight":
            generator = torch.Generator().manual_seed(zlib.crc32(canonical(name).encode()))
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def canonical(name: str) -> str:
    """The same for a parameter of either plan."""
    layer = re.search(r"layers\..*", name)
    return name if layer is None else layer[0].replace(".value.", ".default.")


def _rows(prepared: Prepared) -> list[TrainingRow]:
    tokens = TokenSet(Path(prepared.train_dir))
    return [tokens[row] for row in range(len(tokens))]


def _micros(prepared: Prepared, runtime: Runtime) -> list[MicroBatch]:
    """This rank's rows in two micro-batches."""
    mine = _rows(prepared)[runtime.rank :: runtime.ranks]
    half = len(mine) // 2
    return [collate(mine[:half]), collate(mine[half:], packed=True)]


def _train(job: Job) -> dict[str, Any]:
    roles, micros, case = job.roles(), _micros(job.prepared, job.runtime), job.case
    frozen = _digest(roles)
    (count,) = job.runtime.control.sum([float(sum(len(micro.index) for micro in micros))])
    norms, weights = [], [_weights(roles)]
    for update in range(UPDATES):
        if job.case.resume and update == SAVED.step:
            roles = job.again(roles)
        taught = {name: role for name, role in roles.both().items() if name == "critic" or update >= case.idle}
        for micro in micros:
            for name, role in taught.items():
                with role.scope():
                    role.backward(_loss(name, role.forward(micro), micro) * job.runtime.ranks / count)
        for (name, role), rate in zip(roles.both().items(), RATES, strict=True):
            role.set_learning_rate(rate if name in taught else 0.0)
        stepped = {name: role for name, role in roles.both().items() if name in taught or role.shared}
        norms.append({name: role.step().grad_norm for name, role in stepped.items()})
        weights.append(_weights(roles))
    said_of = [_said(roles, micro) for micro in micros]
    if case.export:
        job.export(roles)
    return {"norms": norms, "weights": weights, "said": said_of, "frozen": (frozen, _digest(roles))}


def plain_roles(folder: Path) -> dict[str, Any]:
    """The same by plain torch, on all rows at once."""
    config = TrainerConfig.model_validate_json((folder / "config.json").read_text())
    prepared = read_manifest(folder / "prepared")
    assert prepared is not None
    models: dict[str, Any] = {"policy": build_policy(config, prepared), "critic": build_critic(config, prepared)}
    micro = collate(_rows(prepared))
    learning = {
        f"{role} {canonical(name)}": parameter
        for role, model in models.items()
        for name, parameter in _moved(model).named_parameters()
        if parameter.requires_grad
    }
    norms, weights = [], [{name: parameter.detach().clone() for name, parameter in learning.items()}]
    for _ in range(UPDATES):
        squares = dict.fromkeys(models, 0.0)
        for role, model in models.items():
            (_loss(role, model(*model.inputs(micro)), micro) / len(micro.index)).backward()
        for name, parameter in learning.items():
            role = name.partition(" ")[0]
            assert parameter.grad is not None
            squares[role] += float(parameter.grad.double().square().sum())
            with torch.no_grad():
                parameter -= RATES[role == "critic"] * parameter.grad
            parameter.grad = None
        norms.append({role: square**0.5 for role, square in squares.items()})
        weights.append({name: parameter.detach().clone() for name, parameter in learning.items()})
    return {"norms": norms, "weights": weights}


def _loss(name: str, out: Any, micro: MicroBatch) -> Tensor:
    """Something of each token that depends on its place, so that no two positions can be exchanged."""
    wanted = torch.sin(micro.targets.float())
    return (out[0] * wanted).sum() if name == "policy" else ((out - 3 * wanted) ** 2).sum()


def _said(roles: Roles, micro: MicroBatch) -> dict[str, Tensor]:
    found = {"logp": said(roles.policy, micro)[0], "value": said(roles.critic, micro)}
    return {**found, "reference": AdapterOff(roles.engine).logp(micro)}


def _weights(roles: Roles) -> dict[str, Tensor]:
    """What each role learns, by canonical names."""
    found = {}
    for role, each in roles.both().items():
        engine: Any = each if isinstance(each, Engine) else each.engine  # type: ignore[attr-defined]
        mine = {name: parameter for name, parameter in each.module.named_parameters() if _is_of(role, each, name)}
        learning = {name: parameter for name, parameter in mine.items() if parameter.requires_grad}
        with engine.gathered(learning.values()):
            found |= {f"{role} {canonical(name)}": each.detach().clone() for name, each in learning.items()}
    return found


def _is_of(role: str, trained: Trained, name: str) -> bool:
    critics = ".value." in name or name == "head.weight"
    return not trained.shared or critics == (role == "critic")


def _digest(roles: Roles) -> str:
    """Over the policy's frozen weights."""
    digest = hashlib.sha256()
    frozen = [parameter for parameter in roles.engine.module.parameters() if not parameter.requires_grad]
    with roles.engine.gathered(frozen):
        for parameter in frozen:
            digest.update(np.ascontiguousarray(parameter.detach().numpy()).tobytes())
    return digest.hexdigest()
