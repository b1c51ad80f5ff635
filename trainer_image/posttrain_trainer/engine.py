"""DeepSpeed behind a small interface: forward, backward, step, save, load, full weights. Nobody else imports it.

Called by the loop, the checkpoints and the export. The configuration and the order of calls are the ones that were
found to give the same update at every ZeRO stage; the comments name what goes wrong otherwise. DeepSpeed is
imported inside functions, because it reads DS_ACCELERATOR at its import and the runtime sets that first.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from posttrain_api.reasons import Reason
from posttrain_trainer.engine_adopt import Adopter, Written
from posttrain_trainer.engine_config import EngineSettings, deepspeed_config
from posttrain_trainer.errors import NotFinite, TrainerFailure
from posttrain_trainer.grad_norms import RoleNorms
from posttrain_trainer.microbatch import MicroBatch
from posttrain_trainer.optimizers import names_by_group

PERSISTENCE_THRESHOLD = 100_000
"""Elements: ZeRO-3 keeps smaller tensors whole. Tests set 0, so that tiny tensors are sharded as large ones are."""


@dataclass(frozen=True)
class StepInfo:
    """`grad_norm`: of the whole gradient, before clipping; `by_role`: its parts, where several roles share an
    engine."""

    grad_norm: float
    by_role: Mapping[str, float] = field(default_factory=dict)


class Trained(Protocol):
    """A role that learns, as the loop drives it: an engine of its own, or its half of a shared one (roles.py).

    For each micro-batch: forward and backward inside one `scope()`. Then the rates of all roles, then `step` of all.
    """

    @property
    def module(self) -> nn.Module:
        """For names and configuration; never called."""

    @property
    def shared(self) -> bool:
        """Whether other roles are on the same engine: then all are stepped, also one that had no backward."""

    def scope(self) -> AbstractContextManager[None]:
        """Makes the model this role's; around the backward too, which may compute the forward again."""

    def forward(self, micro: MicroBatch) -> Any:
        """What this role says of a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient."""

    def set_learning_rate(self, rate: float) -> None:
        """For the next step."""

    def step(self) -> StepInfo:
        """Clips and applies; `grad_norm` is that of this role. TrainerFailure(NonFinite)."""
        ...

    def train(self, mode: bool = True) -> None:
        """Dropout on or off."""


class Engine:
    """One model with its optimizer, sharded by ZeRO over all ranks."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: EngineSettings) -> None:
        """Needs the default process group. `model` is moved to the accelerator."""
        self.settings = settings
        self._optimizer = optimizer
        self._norm = math.nan
        self._groups = names_by_group(model, optimizer)
        self._engine = _initialize(model, optimizer, settings)
        self._norms = RoleNorms(optimizer)  # before the hook below, which clips
        if settings.zero_stage == 0:
            optimizer.register_step_pre_hook(self._before_plain_step)

    @property
    def module(self) -> nn.Module:
        """The model, for names and configuration. Never call it: at ZeRO-3 only the engine's forward counts
        micro-batches."""
        module: nn.Module = self._engine.module
        return module

    @property
    def shared(self) -> bool:
        """One role has it all."""
        return False

    def scope(self) -> AbstractContextManager[None]:
        """Nothing to choose."""
        return nullcontext()

    def forward(self, micro: MicroBatch) -> Any:
        """What the module returns for a micro-batch on this device: `Scores` of the counted tokens, or one score per
        sequence."""
        return self._engine(*self._engine.module.inputs(micro))

    def backward(self, loss: Tensor) -> None:
        """Accumulates in fp32. Gradients of ranks are averaged: the caller multiplies by the number of ranks."""
        self._engine.backward(loss)

    def set_learning_rate(self, rate: float, role: str | None = None) -> None:
        """For the next step, in every group; `role`: in this role's groups."""
        for group in self._optimizer.param_groups:
            if role is None or group["role"] == role:
                group["lr"] = rate

    def step(self) -> StepInfo:
        """Clips and applies the gradient. TrainerFailure(NonFinite) on every rank where it is not finite: nothing
        is applied."""
        self._engine.step()
        if not self._engine.was_step_applied():
            raise NotFinite("grad_norm")
        buffer = getattr(self._engine.optimizer, "grad_partitions_flat_buffer", None)
        if buffer is not None:
            buffer.zero_()  # ZeRO-3 never does: a parameter without gradient would get the last step's once more
        norm = self._norm if self.settings.zero_stage == 0 else float(self._engine.get_global_grad_norm())
        return StepInfo(norm, self._norms.take(norm, self._engine.device))

    def train(self, mode: bool = True) -> None:
        """Dropout on or off."""
        self._engine.train(mode)

    def save(self, folder: Path) -> None:
        """DeepSpeed's files below `folder`/<tag>; all ranks call it and it ends with a barrier of theirs."""
        self._engine.save_checkpoint(
            str(folder),
            self.settings.tag,
            save_latest=False,
            exclude_frozen_parameters=self.settings.adapter,
        )

    def load(self, folder: Path) -> None:
        """What `save` wrote, at the same world size and stage. TrainerFailure where DeepSpeed finds nothing."""
        ours = [{key: group[key] for key in group if key != "params"} for group in self._optimizer.param_groups]
        path, _ = self._engine.load_checkpoint(
            str(folder), self.settings.tag, load_module_strict=not self.settings.adapter
        )
        if path is None:  # DeepSpeed would go on with a fresh model
            raise TrainerFailure(
                Reason.CHECKPOINT_INCOMPATIBLE,
                f"{folder}: it holds no DeepSpeed state ({self.settings.tag}). Resume from another checkpoint.",
            )
        for group, own in zip(self._optimizer.param_groups, ours, strict=True):
            group.update(own)  # betas, epsilon and decay are the job's, not the checkpoint's

    def adopt(self, folder: Path, written: Written) -> None:
        """What `save` wrote on another number of ranks or at another stage. TrainerFailure where parameters differ."""
        ranks = torch.distributed.get_world_size()
        adopter = Adopter(self._engine, self._groups, torch.distributed.get_rank(), ranks)
        adopter.adopt(folder / self.settings.tag, written)

    def weights(self) -> dict[str, Tensor] | None:
        """The learning weights by name, whole, on the CPU: on rank 0 only. All ranks call it.

        Full fine-tuning: with the buffers that are stored; under an adapter: the adapter's only.
        """
        adapter = self.settings.adapter
        if self.settings.zero_stage == 3:
            gathered: dict[str, Tensor] | None = self._engine._zero3_consolidated_16bit_state_dict(adapter)
            return gathered
        if torch.distributed.get_rank() != 0:
            return None
        learning = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        state = self.module.state_dict()
        return {name: value.detach().cpu() for name, value in state.items() if not adapter or name in learning}

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside it these parameters are whole on every rank, to be read only."""
        if self.settings.zero_stage < 3:
            return nullcontext()
        import deepspeed

        context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)
        return context

    def _before_plain_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # Stage 0 in fp32: DeepSpeed has reduced the gradient by now, but would apply NaN and tells no norm. Each
        # rank holds the same reduced gradient, so they agree without asking.
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        self._norm = float(total)
        if not math.isfinite(self._norm):
            raise NotFinite("grad_norm")
        if self.settings.max_grad_norm > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.max_grad_norm, total)


def _initialize(model: nn.Module, optimizer: torch.optim.Optimizer | None, settings: EngineSettings) -> Any:
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # The shared-memory all-reduce of the CPU accelerator would be compiled at its first use; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False)
    config = deepspeed_config(settings, PERSISTENCE_THRESHOLD)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    except ValidationError as error:
        first = error.errors()[0]
        raise TrainerFailure(
            Reason.IMAGE_INCOMPATIBLE,
            f"deepspeed.overrides: DeepSpeed {deepspeed.__version__} refuses {'.'.join(map(str, first['loc']))} of "
            f"{error.title}: {first['msg']}. Correct or remove the key.",
        ) from error
    return engine


class FrozenEngine:
    """A second model that never learns, on all ranks: sharded at ZeRO-3, else whole on each of them."""

    def __init__(self, model: nn.Module, settings: EngineSettings) -> None:
        """Needs the default process group. `model` is moved to the accelerator."""
        model.requires_grad_(False)
        self._module = model
        self._run: Any
        if settings.zero_stage == 3:
            self._run = _initialize(model, None, replace(settings, offload_optimizer=False))
        else:
            self._run = _on_accelerator(model, settings.bf16)
        self._run.eval()

    @torch.no_grad()
    def forward(self, micro: MicroBatch) -> Any:
        """As Engine.forward, without gradient."""
        module: Any = self._module
        return self._run(*module.inputs(micro))

    def close(self) -> None:
        """Gives its memory back; it cannot be called again."""
        for parameter in self._module.parameters():
            # By hand: at ZeRO-3 DeepSpeed keeps hold of a model that it has once seen.
            for held in (parameter, getattr(parameter, "ds_tensor", None)):
                if held is not None:
                    held.data = torch.empty(0, dtype=held.dtype, device=held.device)
        if self._run is not self._module:
            self._run.destroy()
        del self._run, self._module
        gc.collect()


def _on_accelerator(model: nn.Module, bf16: bool) -> nn.Module:
    from deepspeed.accelerator import get_accelerator

    if bf16:  # as DeepSpeed does: buffers, such as the rotary frequencies, stay as they are
        for parameter in model.parameters():
            if parameter.is_floating_point():  # not the bits of a quantized one
                parameter.data = parameter.data.bfloat16()
    return model.to(get_accelerator().current_device_name())
