"""The policy lent to a rollout: whole weights and nothing that only training needs, and all of it as before afterwards.

Both engines generate inside `lent`. The module is used directly, never through DeepSpeed's engine: a forward there is
counted as a micro-batch. An adapter stays beside its base: merging and taking apart again drifts in bf16.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from posttrain_trainer.engine import Engine
from posttrain_trainer.packing import NAME
from posttrain_trainer.scorer import causal_lm


@contextmanager
def lent(engine: Engine) -> Iterator[Any]:
    """The engine's causal model, below peft, on every rank together: in eval mode, without gradient, at ZeRO-3 with
    its parameters gathered once and DeepSpeed's hooks set aside. Parameters are read only. Afterwards modes, hooks,
    attention and torch's random generators are as they were, however it ends."""
    lm: Any = engine.module.lm
    model = causal_lm(lm)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(engine.scope())
        stack.enter_context(_generators())
        stack.enter_context(_evaluating(lm))
        if engine.settings.zero_stage == 3:
            stack.enter_context(_without_hooks(lm))
        stack.enter_context(engine.gathered(lm.parameters()))
        stack.enter_context(_plain_attention(model))
        stack.enter_context(_exact_head(model.get_output_embeddings()))
        yield model


def _generators() -> Any:
    """Nothing that is drawn or seeded inside is seen outside."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Module by module: a part may be in eval mode on purpose."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """ZeRO-3's hooks would gather and release what is whole already, and would take the order of modules down as
    training's. The dictionaries are exchanged, not emptied: every handle on them stays valid."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    before = [(module, name, getattr(module, name)) for module in model.modules() for name in names]
    for module, name, _ in before:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for module, name, hooks in before:
            setattr(module, name, hooks)


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """The trainer's attention over packed lines knows neither a mask nor a cache."""
    before = model.config._attn_implementation
    if before == NAME:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


@contextmanager
def _exact_head(head: Any) -> Iterator[None]:
    """Logits in fp32 whatever the type of the weights, as training's head makes them: rounded to bf16 they are a part
    of the difference between the two log-probabilities of a token that can be had for a copy of the weight."""
    if head.weight.dtype == torch.float32 or type(head).forward is not nn.Linear.forward:
        yield
        return
    before, weight = head.forward, head.weight.float()
    bias = None if head.bias is None else head.bias.float()
    head.forward = lambda hidden: nn.functional.linear(hidden.float(), weight, bias)
    try:
        yield
    finally:
        head.forward = before
